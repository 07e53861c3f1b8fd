"""Passes alone are timed between the texts, each once, whatever modes make it."""

import statistics

import toys

from ssd_jax import costs
from ssd_jax.benchmark import alone
from ssd_jax.benchmark.alone import PassesAlone, enough
from ssd_jax.plan import DraftPlan, Plan


def records(*lengths):
    return [{"prompt": i, "prompt_tokens": n, "new_tokens": 4} for i, n in enumerate(lengths)]


def test_records_of_a_few_prompts_tell_how_long_texts_are():
    assert not enough(records(*range(7)), 20) and enough(records(*range(8)), 20)
    assert not enough(records(1) * 8, 2), "repeats of one prompt are one prompt"
    assert enough(records(1, 2), 2)


def test_each_pass_is_timed_once_a_turn(monkeypatch):
    stack = toys.stack()
    staged = Plan(width=4, drafts=(DraftPlan(width=2),), depth=3, nodes=6, chunk=8, narrower=(1,))
    own = {"baseline": (stack, Plan(chunk=8)), "staged": (stack, staged)}
    timed = []

    def run(clock, name, count):
        width = clock._states[name][0].shape[1]
        if count == 1:  # not timed
            return 0.0
        timed.append((clock._models[name] is stack.oracle, width))
        return 0.5 * len(timed) * count

    monkeypatch.setattr(costs.PassClock, "_run", run)
    monkeypatch.setattr(alone, "_FEWEST_TURNS", 2)
    passes = PassesAlone(own, records(4, 8, 12))
    timed.clear()
    passes.turn()
    assert sorted(timed) == [
        *((False, width) for width in (2, 8, 32)),
        *((True, width) for width in (1, 4, 8, 32)),
    ]
    found = passes.costs()
    assert len(timed) == 2 * 7, "turns that are missing are made up for"
    # The means of the first and the second turn.
    at = [i for i, one in enumerate(timed, 1) if one == (True, 1)]
    assert found["baseline"]["oracle"]["seconds"] == statistics.fmean(0.5 * i for i in at)
    oracle = found["staged"]["oracle"]
    assert oracle["narrower"] == {"1": found["baseline"]["oracle"]["seconds"]}
    assert (oracle["width"], oracle["prefill_width"], oracle["slots"]) == (4, 8, 12)
    assert set(found["staged"]) == {"oracle", "draft"} and found["staged"]["draft"]["width"] == 2
    assert set(found["baseline"]) == {"oracle"}
