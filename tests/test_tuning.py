"""The tuner: replays are what the engine does, costs are recovered, plans are kept and found."""

import dataclasses
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax import tuned
from ssd_jax.batch import generate_batch
from ssd_jax.costs import PassCosts
from ssd_jax.errors import PlanError, PromptError, SamplingError
from ssd_jax.generate import resolve_plan
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.sampling import Sampling
from ssd_jax.tuning import command, cost, tuner
from ssd_jax.tuning.logs import log_text
from ssd_jax.tuning.replay import Replay, Walk
from ssd_jax.tuning.search import Space, search

CAPACITY = 64
NEW_TOKENS = 24
PROMPTS = [[1, 2, 3], [5, 5, 4, 3, 9, 11, 2, 5, 5, 4, 30]]
SAMPLINGS = {"greedy": {}, "sampled": dict(temperature=1.0, top_k=9)}
SHY = DraftPlan(rounds=2, width=2, branch=2, threshold=0.2, cost=0.0)
# Its trees answer for nearly all that the plans below ask.
GENEROUS = Plan(
    width=1,
    drafts=(DraftPlan(rounds=4, width=40, branch=6, threshold=0.0),),
    ngram=NGramPlan(levels=2, width=4, branch=2, match=4),
    depth=6,
    nodes=159,
    floor=0.0,
)
PLANS = {
    "tree": Plan(
        width=5,
        drafts=(SHY,),
        ngram=NGramPlan(levels=2, width=2, branch=2, match=3, match_prob=(0.2, 0.4, 0.6)),
        depth=4,
        nodes=14,
        floor=0.02,
        chunk=8,
    ),
    # The tree is full, and the n-gram's guesses leave the draft behind the text.
    "full": Plan(
        width=4,
        drafts=(DraftPlan(rounds=1, width=2, branch=1, threshold=0.0, cost=0.0),),
        ngram=NGramPlan(levels=3, width=3, branch=1, match=4),
        depth=5,
        nodes=5,
        floor=0.0,
        chunk=8,
    ),
    "off": Plan(
        width=4,
        drafts=(DraftPlan(rounds=0, width=2, cost=0.0),),
        ngram=NGramPlan(levels=2, width=2, branch=1, match=2),
        depth=4,
        nodes=8,
        chunk=4,
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSD_JAX_CACHE", str(tmp_path))


def logs_of(stack, sampling, plan):
    logs = []
    for prompt in PROMPTS:
        text = generate_batch(
            stack, [prompt], NEW_TOKENS, sampling, Plan.baseline(), capacity=CAPACITY
        )[0].tokens
        logs.append(
            log_text(
                stack,
                [*prompt, *text],
                len(prompt),
                len(prompt) + NEW_TOKENS,
                sampling,
                capacity=CAPACITY,
                plan=plan,
            )
        )
    return logs


def assert_replays(stack, plans, generous):
    """Round by round: tokens committed and passes made are what the engine's are, wherever the
    logged trees hold all nodes that the plan's drafts evaluate."""
    drafts = stack.stage_names[1 : 1 + len(stack.drafts)]
    within = dict.fromkeys(plans, 0)
    for options in SAMPLINGS.values():
        sampling = Sampling.create(1, **options, seed=5)
        replay = Replay(logs_of(stack, sampling, generous))
        for name, plan in plans.items():
            for prompt, walk in zip(PROMPTS, replay.walks(plan), strict=True):
                if walk.answered < walk.asked:
                    continue
                within[name] += 1
                result = generate_batch(
                    stack, [prompt], NEW_TOKENS, sampling, plan, capacity=CAPACITY
                )[0]
                assert list(walk.round_tokens) == result.stats.round_tokens, name
                made = [a + b for a, b in zip(walk.passes, walk.caught_up, strict=True)]
                assert made == [result.stats.passes[draft] for draft in drafts], name
    assert min(within.values()) >= 2  # of four texts


def test_a_replay_is_what_the_engine_does():
    stack = toys.stack("between", layers=1)
    assert_replays(stack, PLANS, GENEROUS)
    # Narrower passes of the oracle have a replay of their own, from the same growths.
    replay = Replay(logs_of(stack, Sampling.create(1), GENEROUS))
    rounds = [
        sum(walk.rounds for walk in replay.walks(replace(PLANS["tree"], width=width)))
        for width in (2, 3, 5)
    ]
    assert rounds[0] > rounds[1] >= rounds[2]


def test_a_replay_of_two_drafts_is_what_the_engine_does():
    plan = replace(PLANS["full"], drafts=PLANS["full"].drafts * 2)
    wide = replace(GENEROUS.drafts[0], rounds=2, width=80)
    generous = replace(GENEROUS, drafts=(wide, wide))
    assert_replays(toys.stack("between", drafts=2, layers=1), {"two": plan}, generous)


def test_what_the_logs_cannot_answer_is_told():
    poor = replace(
        GENEROUS, drafts=(replace(SHY, width=8, rounds=12, threshold=0.9),), nodes=8, ngram=None
    )
    replay = Replay(logs_of(toys.stack("between", layers=1), Sampling.create(1), poor))
    walks = replay.walks(PLANS["tree"])
    assert 0 < sum(walk.answered for walk in walks) < sum(walk.asked for walk in walks)


def test_a_replay_refuses_plans_that_the_logs_do_not_hold_for():
    stack = toys.stack("between", layers=1)
    for kind, options in SAMPLINGS.items():
        replay = Replay(logs_of(stack, Sampling.create(1, **options), GENEROUS))
        plan, (draft,) = PLANS["full"], PLANS["full"].drafts
        other = {"greedy": "sampled", "sampled": "greedy"}[kind]
        ours, theirs = replace(draft, **{f"tau_{kind}": 0.9}), replace(draft, **{f"tau_{other}": 2})
        assert replay.walks(replace(plan, drafts=(theirs,)))  # of the other kind, not asked for
        with pytest.raises(PlanError, match="the plan has 0.9"):
            replay.walks(replace(plan, drafts=(ours,)))
        for adapting in (plan.paced(0.1, [0.0]), replace(plan, drafts=(replace(draft, cost=0.1),))):
            with pytest.raises(PlanError, match="unpaced"):
                replay.walks(adapting)
            assert replay.walks(adapting.unpaced()) == replay.walks(plan)


def test_a_plan_is_paced_by_what_passes_cost():
    seconds = {"oracle": {1: 4.0, 6: 9.0}, "draft": {1: 0.4, 4: 1.0}, "draft2": {1: 0.1}}
    draft = DraftPlan(width=4, cost=7.0)
    plan = Plan(width=6, drafts=(draft, replace(draft, width=1)), depth=4, nodes=9)
    paced = cost.paced(plan, PassCosts(seconds, slots=32))
    assert (paced.narrower, paced.row_cost) == ((1,), pytest.approx((9 - 4) / 5 / 4))
    assert [own.cost for own in paced.drafts] == pytest.approx([1 / 4, 0.1 / 4])
    assert paced.unpaced() == plan.unpaced() != plan
    assert cost.paced(Plan.baseline(), PassCosts(seconds, slots=32)) == Plan.baseline()


def test_costs_are_recovered_from_runs():
    planted = np.array([1.2, 2e-4, 5e-5, 0.0, 3e-6, 1e-8])
    amounts = np.random.default_rng(0).integers(1, 90, (12, 6))
    amounts = amounts * np.array([1e-3, 1, 2, 3, 20, 4000.0])
    assert np.allclose(cost.fit([(own, own @ planted) for own in amounts]), planted, atol=1e-12)
    # Nothing goes below zero, though a negative factor would explain these runs.
    planted[2] = -1e-4
    assert min(cost.fit([(own, max(own @ planted, 1e-4)) for own in amounts])) >= 0


def test_costs_lie_on_straight_lines_between_and_beyond_the_measured_widths():
    costs = PassCosts({"oracle": {1: 1.0, 4: 4.0, 8: 6.0}}, slots=32)
    assert [costs.of("oracle", width) for width in (1, 2, 6, 8, 12)] == [1.0, 2.0, 5.0, 6.0, 8.0]


def test_seconds_are_passes_and_what_lies_between_them():
    costs = PassCosts({"oracle": {1: 1.0, 64: 64.0}, "draft": {1: 0.1, 64: 6.4}}, slots=32)
    plan = Plan(width=5, drafts=(DraftPlan(rounds=2, width=3),), depth=3, nodes=9, chunk=8)
    walk = Walk((3, 2), passes=(4,), caught_up=(1,), extensions=0, answered=0, asked=0)
    log = dataclasses.make_dataclass("Log", ["start"])(start=10)
    alone = (2 * 8 + 2 * 5) + (2 * 0.8 + 0.8 + 4 * 0.3)  # prefill in two chunks of 8
    model = cost.CostModel(costs, (1.5, 10.0, 1.0, 0.0, 0.5, 0.0))
    assert model.seconds(plan, walk, log) == pytest.approx(1.5 * alone + 2 * 10 + 4 + 0.5 * 22)
    # Of 41 tokens, 32 in one wide pass and 9 in two.
    longer = dataclasses.replace(log, start=42)
    more = (32 + 2 * 8) * 1.1 - 2 * 8 * 1.1
    assert model.seconds(plan, walk, longer) - model.seconds(plan, walk, log) == (
        pytest.approx(1.5 * more)
    )


def plan_size(plan: Plan) -> float:
    """A made-up prediction, best at width 8, one pass of the first draft and no n-gram."""
    passes = sum(draft.rounds for draft in plan.drafts)
    return 1 + abs(plan.width - 8) + abs(passes - 1) + 2 * (plan.ngram is not None)


SPACES = [Space(2, True, False, 24), Space(1, False, True), Space(0, False, False, 6)]


@pytest.mark.parametrize("space", SPACES)
def test_the_search_stays_within_what_the_stack_can(space):
    steps = itertools.islice(search(space, plan_size, seconds=600.0), 600)
    *_, (_, ranking) = steps
    assert len(ranking) > 10 and [s for s, _ in ranking] == sorted(s for s, _ in ranking)
    for _, plan in ranking:
        plan.check_stack(space.drafts, space.trigram)
        assert plan == plan.unpaced()
        assert 1 < plan.width <= min(space.max_width, plan.nodes + 1)
    best = ranking[0][1]
    if space.drafts:
        assert (best.width, best.ngram, [d.rounds for d in best.drafts]) == (8, None, [1])
    # What does not bear on these texts stays as it is.
    for kind, sampled in (("greedy", False), ("sampled", True)):
        values = {getattr(d, f"prior_{kind}") for _, plan in ranking for d in plan.drafts}
        assert (len(values) > 1) == (space.drafts > 0 and space.sampled == sampled)


SMALL = Plan(width=3, ngram=NGramPlan(levels=1, branch=0), depth=2, nodes=4)
COSTS = PassCosts({"oracle": {1: 1e-3, 8: 2e-3}, "draft": {1: 1e-4}}, slots=64)


def test_plans_are_kept_for_this_device_and_stack_alone(monkeypatch):
    stack = toys.stack(layers=1)
    assert tuned.load(stack) is None and tuned.load_costs(stack) is None
    tuned.save(stack, tuned.Tuned({"greedy": SMALL}, {"greedy": 1.5}, COSTS))
    found = tuned.load(stack)
    assert found == tuned.Tuned({"greedy": SMALL}, {"greedy": 1.5}, COSTS)
    assert tuned.load_costs(stack) == COSTS
    # The other kind joins the first.
    tuned.save(stack, tuned.Tuned({"sampled": Plan.baseline()}, {"sampled": None}, COSTS))
    found = tuned.load(stack)
    assert found.plans == {"greedy": SMALL, "sampled": Plan.baseline()}
    assert tuned.load(toys.stack("never", layers=1)) is None  # shapes alike, weights not
    monkeypatch.setattr(tuned, "device_name", lambda: "another")
    assert tuned.load(stack) is None


def test_generate_follows_the_kept_plan_of_its_kind(tmp_path):
    stack = toys.stack(layers=1)
    default = Plan.staged(1, True).on_cpu([1.0])
    assert resolve_plan(stack, "staged", None, sampled=False) == (default, "default")
    path = tuned.save(stack, tuned.Tuned({"greedy": SMALL}, {"greedy": 1.5}, COSTS))
    plan, source = resolve_plan(stack, "staged", None, sampled=False)
    assert plan == SMALL and str(path) in source
    assert resolve_plan(stack, "staged", None, sampled=True)[0] == default
    assert resolve_plan(stack, "staged", "default", sampled=False)[0] == default
    assert resolve_plan(stack, "staged", PLANS["tree"], sampled=False)[0] == PLANS["tree"]
    assert resolve_plan(stack, "speculative", None, sampled=False)[0] == Plan.speculative()
    result = ssd_jax.generate(stack, [1, 2, 3], max_new_tokens=8)
    assert "draft" not in result.stats.passes


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\xff",
        lambda text: text.replace(f'"schema": {tuned.SCHEMA}', '"schema": 0'),
        lambda text: text.replace('"width": 3', '"width": "3"'),
        lambda text: text.replace('"branch": 0', '"branch": 2'),  # a trigram that is not there
        lambda text: text.replace('"greedy"', '"gready"'),
        lambda text: text.replace('"8": 0.002', '"8": -1'),
        lambda text: text.replace('"costs"', '"coasts"'),
        lambda text: text.replace('"cores":', '"cores": 1,\n"more":'),
    ],
)
def test_damaged_files_are_ignored_and_named(change):
    stack = toys.stack(ngram=False, layers=1)
    path = tuned.save(stack, tuned.Tuned({"greedy": SMALL}, {"greedy": 1.5}, COSTS))
    damaged = change(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged, encoding="latin-1")
    with pytest.warns(UserWarning, match=path.name):
        plan, source = resolve_plan(stack, "staged", None, sampled=False)
    assert (plan, source) == (Plan.staged(1, False).on_cpu([1.0]), "default")
    with pytest.warns(UserWarning, match=path.name):
        tuned.save(stack, tuned.Tuned({"greedy": SMALL}, {"greedy": 1.5}, COSTS))
    assert tuned.load(stack).plans == {"greedy": SMALL}


def pretend(monkeypatch, oracle, draft):
    """Passes take what the functions of their width say, in runs too, and nothing else does."""
    run = tuner._Bench.run

    def timed(self, index, plan, options):
        result = run(self, index, plan, options)
        stats = result.stats
        seconds = sum(map(oracle, stats.round_widths))
        for name, own in zip(("draft",), plan.drafts, strict=False):
            seconds += stats.passes[name] * draft(own.width)
        return replace(result, stats=replace(stats, seconds=seconds))

    widths = (1, 2, 4, 8, 16, 32, 48)
    seconds = {"oracle": {w: oracle(w) for w in widths}, "draft": {w: draft(w) for w in widths}}
    monkeypatch.setattr(tuner._Bench, "run", timed)
    monkeypatch.setattr(tuner.cost, "measure_passes", lambda *_: PassCosts(seconds, 48))


# A prompt of one token is read without a pass.
SHORT = [[7], [5]]
OPTIONS = dict(max_new_tokens=12, kinds=["greedy"], search_seconds=1.0, confirm=1, repeats=1)


def test_plans_that_differ_below_what_is_looked_at_are_confirmed_once(monkeypatch):
    bench = tuner._Bench.of(toys.stack(layers=1), SHORT, OPTIONS["max_new_tokens"], seed=0)
    job = tuner._Job(bench, "greedy", {}, COSTS, Space(1, True, False), lambda *_: None)
    deep = [replace(SMALL, depth=depth) for depth in (7, 9)]
    other = replace(SMALL, nodes=6)
    job.ranking = [(float(place), plan) for place, plan in enumerate([*deep, other])]
    measured = []
    monkeypatch.setattr(job, "_measure", lambda names, *_: measured.extend(names))
    job.confirm(2, repeats=1)
    assert measured == ["baseline", "default", "found 1", "found 2"]
    found = [job.plans[name].unpaced() for name in measured[2:]]
    assert found == [SMALL, other]


def test_a_useless_draft_on_a_narrow_device_is_left_alone(monkeypatch):
    pretend(monkeypatch, oracle=lambda width: 0.01 * width, draft=lambda width: 0.005 * width)
    stack = toys.stack("never", ngram=False, layers=1)
    found = ssd_jax.tune(stack, SHORT, **OPTIONS)
    rows = {row.name: row for row in found.rows["greedy"]}
    assert found.tuned.plans["greedy"] == Plan.baseline() and rows["baseline"].kept
    assert rows["default"].speedup < rows["found 1"].speedup <= 1
    best = rows["found 1"].plan
    assert not best.drafts  # of what speculates, the cheapest
    # What ran is what would be kept: the costs are those of its passes.
    assert (best.narrower, best.row_cost) == ((1,), pytest.approx(1.0))
    assert rows["default"].plan == Plan.staged(1, False).on_cpu([1.0])
    for row in rows.values():
        if row.name in ("wide", "narrow", "chain"):  # the others rest, which is not predicted
            assert row.predicted_tokens_per_pass == pytest.approx(row.tokens_per_pass, rel=0.1)
    assert resolve_plan(stack, "staged", None, sampled=False)[0] == Plan.baseline()


def test_a_draft_that_is_right_is_used_and_ctrl_c_keeps_what_was_measured(monkeypatch):
    pretend(monkeypatch, oracle=lambda width: 0.01, draft=lambda width: 1e-4)
    stack = toys.stack("always", ngram=False, layers=1)
    interrupted = []

    def interrupt(what, share):
        if "confirming, " in what or ("plans tried" in what and not interrupted):
            interrupted.append(what)
            raise KeyboardInterrupt

    found = ssd_jax.tune(stack, SHORT, **OPTIONS, on_progress=interrupt)
    assert len(interrupted) == 2  # the search was cut short, then the confirmation
    assert found.interrupted and found.searched["greedy"] == 1
    rows = {row.name: row for row in found.rows["greedy"]}
    best = max(rows.values(), key=lambda row: row.speedup)
    assert best.kept and best.speedup > 2 and best.plan.drafts
    assert json.loads(found.path.read_text())["plans"]["greedy"] == json.loads(best.plan.to_json())


def test_tuning_refuses_what_makes_no_sense():
    stack = toys.stack(layers=1)
    with pytest.raises(PromptError, match="at least one prompt"):
        ssd_jax.tune(stack, [])
    with pytest.raises(SamplingError, match="at least 1"):
        ssd_jax.tune(stack, PROMPTS, repeats=0)
    with pytest.raises(SamplingError, match="temperature above 0"):
        ssd_jax.tune(stack, PROMPTS, sampling={"temperature": 0.0})
    with pytest.raises(SamplingError, match="max_width"):
        ssd_jax.tune(stack, PROMPTS, max_width=1)


@pytest.mark.parametrize(
    "argv, named",
    [
        ("--temperature 0", "--temperature"),
        ("--search-seconds -1", "--search-seconds"),
        ("--limit 0", "--limit"),
        ("--ngram x", "--oracle"),
    ],
)
def test_the_command_checks_its_arguments_first(argv, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and named in error
