"""Run-time adaptation: the best width, rests where drafting does not pay, trials of drafts, the
same text."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.batch import Batch, first_state, generate_batch
from ssd_jax.decode import new_round
from ssd_jax.pacing import AMONG, TRIAL, Pace, after_round, best_width
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack
from ssd_jax.stages import foresight

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


def test_a_draft_that_fails_its_trial_is_asked_again_after_a_long_rest():
    failed = jax.jit(Pace.tried)(Pace.start(), np.float32(0.9))
    waited = {"resting": failed, "drafting": failed}
    for _ in range(LONGEST_REST):
        assert not any(pace.trusted or pace.trial_due for pace in waited.values())
        waited["resting"] = waited["resting"].rested()
        waited["drafting"] = after_round(waited["drafting"], np.float32(3), np.float32(2))
    assert all(pace.trial_due for pace in waited.values())
    passed = jax.jit(Pace.tried)(waited["drafting"], np.float32(1))
    for _ in range(3 * LONGEST_REST):
        assert passed.trusted and not passed.trial_due
        passed = after_round(passed, np.float32(3), np.float32(2))


def ranks(draft, text) -> np.ndarray:
    """How many tokens the draft prefers to each of the newest, of which it reads nothing else."""
    newest = np.array(text[-TRIAL - 1 :], np.int32)
    position = np.arange(len(text) - TRIAL - 1, len(text) - 1)
    logits = np.asarray(draft(newest[None, :-1], position[None])[0][0])
    own = logits[np.arange(TRIAL), newest[1:]]
    return (logits > own[:, None]).sum(axis=-1)


def trial(draft, texts) -> int:
    models = (draft, draft)
    capacities = Capacities.of(PLAN, 64)
    limits = [len(text) if len(text) <= TRIAL else 60 for text in texts]
    state = first_state(models, texts, limits, (), capacities)
    sampling = Sampling.create(len(state.length))
    rnd = new_round(models, None, state, sampling, Policy.of(PLAN), capacities)
    return int(foresight(rnd, 1, TRIAL, AMONG))


def test_a_trial_counts_what_the_draft_would_have_said():
    draft = toys.blend(toys.model(0), 0.3)
    random = np.random.default_rng(5).integers(0, toys.VOCAB, 40).tolist()
    said = PROMPT + run(toys.stack("between"), "greedy", Plan.baseline(), 20).tokens
    texts = (random[: TRIAL + 1], random, said)
    foreseen = [trial(draft, [text]) for text in texts]
    assert foreseen == [int((ranks(draft, text) < AMONG).sum()) for text in texts]
    assert len(set(foreseen)) > 1 and max(foreseen) <= TRIAL
    # A row that has ended does not count, however short it is.
    assert trial(draft, [random, said, [7]]) == sum(foreseen[1:])
    # Nor does what is no number count as foreseen.
    assert trial(toys.blend(draft, float("nan")), [said]) == 0


def hopeless(stack, text) -> Stack:
    """The stack with a draft that has no token of the text among its best."""
    for token in range(toys.VOCAB):
        draft = toys.stubborn(toys.model(50, layers=1), token)
        best = np.argsort(np.asarray(draft(np.zeros((1, 1), np.int32))[0])[0, 0])[-AMONG:]
        if not set(best.tolist()) & set(text):
            return replace(stack, drafts=(draft,))
    raise AssertionError("the text has tokens of every kind")


COSTLY = replace(PLAN, narrower=(1,), drafts=(replace(PLAN.drafts[0], cost=0.2),))
PATIENT = TRIAL + 1 - len(PROMPT)  # tokens until there is text enough for a trial


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_hopeless_draft_is_not_asked(sampling):
    stack = toys.stack("between", ngram=False, layers=1)
    expected = run(stack, sampling, Plan.baseline(), 30)
    stack = hopeless(stack, PROMPT + expected.tokens)
    for plan in (COSTLY, replace(COSTLY, ngram=None)):
        got = run(stack, sampling, plan, 30)
        assert got.tokens == expected.tokens
        assert sum(got.stats.round_passes["draft"][:PATIENT]) > 0
        assert sum(got.stats.round_passes["draft"][PATIENT:]) == 0
        if plan.ngram is None:
            assert set(got.stats.round_widths[PATIENT:]) == {1}


def test_look_up_goes_on_without_a_hopeless_draft():
    stack = toys.stack("between", ngram=False, layers=1)
    prompt = PROMPT + run(stack, "greedy", Plan.baseline(), 40).tokens
    stack = hopeless(stack, prompt)
    noise = Sampling.create(1)
    expected = generate_batch(stack, [prompt], 40, noise, Plan.baseline())[0]
    got = generate_batch(stack, [prompt], 40, noise, COSTLY)[0]
    assert got.tokens == expected.tokens
    assert sum(got.stats.round_passes["draft"]) == 0
    assert got.stats.rounds < 35


def test_a_draft_gets_another_trial():
    """The prompt is beyond it, the text that follows is its own."""
    stack = toys.stack("always", ngram=False, layers=1, n_positions=192)
    rng = np.random.default_rng(0)
    prompts = (rng.integers(0, toys.VOCAB, TRIAL + 1).tolist() for _ in range(200))
    prompt = next(p for p in prompts if (ranks(stack.oracle, p) >= AMONG).all())
    plan = replace(COSTLY, ngram=None)
    got = generate_batch(stack, [prompt], 100, Sampling.create(1), plan)[0]
    asked = np.array(got.stats.round_passes["draft"]) > 0
    assert not asked[:LONGEST_REST].any() and asked[LONGEST_REST:-1].all()
    assert len(asked) < LONGEST_REST + 36 / 2


def test_what_processors_change_is_no_trial():
    stack = toys.stack("between", ngram=False, layers=1)
    noise = Sampling.create(1, repetition_penalty=1.3)
    expected = generate_batch(stack, [PROMPT], 30, noise, Plan.baseline())[0]
    stack = hopeless(stack, PROMPT + expected.tokens)
    draft = replace(COSTLY.drafts[0], cost=1e-6)
    plan = replace(COSTLY, ngram=None, drafts=(draft,))
    got = generate_batch(stack, [PROMPT], 30, noise, plan)[0]
    assert got.tokens == expected.tokens
    assert sum(got.stats.round_passes["draft"][PATIENT:]) > 0


@pytest.mark.parametrize("kind", ["hopeless", "between"])
def test_chunks_try_drafts_where_one_run_does(kind):
    stack = toys.stack("between", ngram=False, layers=1)
    whole = run(stack, "greedy", Plan.baseline(), 40)
    if kind == "hopeless":
        stack = hopeless(stack, PROMPT + whole.tokens)
    whole = run(stack, "greedy", COSTLY, 40)
    batch = Batch(stack, [PROMPT], 40, Sampling.create(1, seed=3), COSTLY)
    while batch.running:
        batch.advance(3)
    (got,) = batch.results([batch.ending(0)], [None])
    assert got.tokens == whole.tokens
    assert got.stats.round_widths == whole.stats.round_widths
    assert got.stats.round_passes == whole.stats.round_passes
