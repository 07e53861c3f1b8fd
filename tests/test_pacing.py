"""Run-time adaptation: the best width, rests where drafting does not pay, the same text."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.batch import generate_batch
from ssd_jax.pacing import Pace, after_round, best_width
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.sampling import Sampling

ROUNDS = 3000
LONGEST_REST = 64


width_of = jax.jit(best_width, static_argnames="widths")


@given(
    st.lists(st.floats(0.0, 1.0, width=32), min_size=12, max_size=12),
    st.sampled_from([(1, 12), (2, 3, 7), (1, 4, 8, 12), (5,)]),
    st.floats(0.0, 0.5, width=32),
    st.floats(0.5, 8.0, width=32),
)
@settings(max_examples=60, deadline=None)
def test_the_width_is_worth_the_most(chances, widths, row_cost, rate):
    gain = np.float32(sorted(chances, reverse=True))
    pace = replace(Pace.start(), tokens=np.float32(rate), cost=np.float32(1))
    worth = [
        sum(map(float, gain[:width])) - max(rate, 1.0) * row_cost * (width - 1) for width in widths
    ]
    chosen = int(width_of(pace, gain, widths, np.float32(row_cost)))
    assert worth[chosen] == pytest.approx(max(worth), abs=1e-4)


@jax.jit
def attempts(tokens, costs):
    """Which rounds draft, where an attempt in round ``i`` brings ``tokens[i]`` at ``costs[i]``."""

    def step(pace, own):
        return after_round(pace, *own), pace.drafting

    return jax.lax.scan(step, Pace.start(), (tokens, costs))[1]


def drafting(tokens, costs) -> np.ndarray:
    return np.asarray(attempts(*np.broadcast_arrays(np.float32(tokens), np.float32(costs))))


def test_rests_grow_up_to_the_limit():
    (tried,) = np.nonzero(drafting(np.ones(ROUNDS), 2.0))
    rests = (np.diff(tried) - 1).tolist()
    assert rests[0] == 16 and set(rests[1:]) == {LONGEST_REST}


def test_rests_end_when_an_attempt_pays():
    tokens = np.ones(ROUNDS)
    good = slice(1000, 2000)
    tokens[good] = 3.0
    tried = drafting(tokens, 2.0)
    first = int(np.argmax(tried[good]))
    assert first <= LONGEST_REST and tried[good][first:].all()
    # What has paid before is tried again soon.
    (later,) = np.nonzero(tried[good.stop :])
    rests = np.diff(later) - 1
    assert rests[rests > 0][:3].tolist() == [1, 4, 16]


@given(st.floats(1.0, 2.5), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_useless_draft_costs_little(most, least, seed):
    """It never brings a token of its own; attempts cost up to one and a half plain steps more."""
    share = np.random.default_rng(seed).uniform(least, 1.0, ROUNDS)
    costs = 1 + (most - 1) * share
    tried = drafting(np.ones(ROUNDS), costs)
    # A token a round; a round of rest costs what a plain step does.
    total = np.sum(np.where(tried, costs, 1.0))
    assert total <= 1.05 * ROUNDS + 12


@given(st.floats(1.0, 6.0), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_draft_that_pays_never_rests(most, share, seed):
    tokens = np.random.default_rng(seed).uniform(1.0, most, ROUNDS).astype(np.float32)
    assert drafting(tokens, np.float32(1) + np.float32(share) * (tokens - 1)).all()


WIDTHS = (1, 3, 8)
PLAN = Plan(
    width=WIDTHS[-1],
    narrower=WIDTHS[:-1],
    drafts=(DraftPlan(rounds=3, width=3, branch=3, threshold=0.0),),
    ngram=NGramPlan(levels=2, width=3, branch=0, match=3),
    depth=6,
    nodes=24,
    floor=0.0,
    chunk=8,
)
PROMPT = [5, 5, 4, 3, 9, 11, 2, 5, 5, 4, 30]
SAMPLINGS = {"greedy": {}, "top_k": dict(temperature=1.0, top_k=9)}


def run(stack, sampling, plan, new_tokens=50):
    noise = Sampling.create(1, **SAMPLINGS[sampling], seed=3)
    return generate_batch(stack, [PROMPT], new_tokens, noise, plan)[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_narrower_passes_write_what_plain_decoding_writes(sampling):
    stack = toys.stack("between", ngram=False, layers=1)
    expected = run(stack, sampling, Plan.baseline())
    assert expected.stats.round_widths == [1] * 50
    used = set()
    for row_cost in (0.0, 0.05, 0.15, 100.0):
        got = run(stack, sampling, replace(PLAN, row_cost=row_cost))
        assert got.tokens == expected.tokens
        assert len(got.stats.round_widths) == got.stats.rounds
        used |= set(got.stats.round_widths)
    assert used == set(WIDTHS)


@pytest.mark.parametrize("narrower", [PLAN.narrower, ()], ids=["plainly", "in wide passes"])
def test_a_useless_draft_mostly_rests(narrower):
    stack = toys.stack("never", ngram=False, layers=1)
    expected = run(stack, "greedy", Plan.baseline())
    passes = {}
    for cost in (0.0, 0.3):
        draft = replace(PLAN.drafts[0], cost=cost)
        got = run(stack, "greedy", replace(PLAN, drafts=(draft,), ngram=None, narrower=narrower))
        assert got.tokens == expected.tokens
        passes[cost] = got.stats.round_passes["draft"]
    assert all(passes[0.0][:-1])  # free, it never rests; for the last token nothing drafts
    assert sum(passes[0.3]) < sum(passes[0.0]) / 4


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_round_that_drafts_nothing_is_one_of_plain_decoding(sampling):
    stack = toys.stack("between", ngram=False, layers=1)
    expected = run(stack, sampling, Plan.baseline())
    plan = replace(PLAN, narrower=(1,), drafts=(replace(PLAN.drafts[0], cost=1.0),))
    got = run(stack, sampling, plan)
    assert got.tokens == expected.tokens
    rounds = list(zip(got.stats.round_widths, got.stats.round_passes["draft"], strict=True))
    assert {1, PLAN.width} == set(got.stats.round_widths)
    assert all((width == 1) == (passes == 0) for width, passes in rounds)
    # Nothing is drafted for a last token, which is the oracle's own in any case.
    last = run(stack, sampling, plan, new_tokens=1)
    assert last.tokens == expected.tokens[:1]
    assert (last.stats.round_widths, last.stats.round_passes["draft"]) == ([1], [0])
