"""The engine: lossless whatever is drafted, caches exact, limits kept, nothing compiled twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys
from flax import nnx

from ssd_jax import batch as batches
from ssd_jax import decode as engine
from ssd_jax.batch import first_state
from ssd_jax.checkpoint import save_model
from ssd_jax.compiled import cache_sized_copies, described, gpu_device
from ssd_jax.gpt2 import GPT2
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan, Policy, prefill_passes
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Flat

TEXT = 64
NGRAM = NGramPlan(levels=2, width=4, branch=2, match=3, match_prob=(0.2, 0.4, 0.6))
# One set of capacities; policies below vary inside it without compiling again.
WIDE = Plan(
    width=8,
    drafts=(DraftPlan(rounds=3, width=3, branch=3, threshold=0.0),) * 2,
    ngram=NGRAM,
    depth=6,
    nodes=28,
    floor=0.0,
    chunk=8,
)
SAMPLINGS = {
    "greedy": {},
    "top_k": dict(temperature=1.0, top_k=9),
    "top_p": dict(temperature=0.8, top_p=0.95),
}
PROMPTS = [[1, 2, 3], [7], [5, 5, 4, 3, 9, 11, 2, 5, 5, 4, 30]]


def plan_for(count: int, **changes) -> Plan:
    return dataclasses.replace(WIDE, **{"drafts": WIDE.drafts[:count], **changes})


def policies(drafts: int) -> list[Policy]:
    """The plan itself, a chain, nothing but the n-gram, and drafts without the n-gram."""
    chain = DraftPlan(rounds=3, width=2, branch=1, threshold=0.0)
    shy = DraftPlan(rounds=2, width=3, branch=2, threshold=0.3, tau_greedy=0.5, tau_sampled=2.0)
    quiet = dataclasses.replace(NGRAM, levels=0)
    off = DraftPlan(rounds=0)
    plans = [
        plan_for(drafts),
        plan_for(drafts, drafts=(chain,) * drafts, ngram=quiet, width=4, depth=3),
        plan_for(drafts, drafts=(off,) * drafts),
        plan_for(drafts, drafts=(shy,) * drafts, ngram=quiet, floor=0.05),
    ]
    return [Policy.of(plan, match=NGRAM.match) for plan in plans]


def start(stack, prompts, new_tokens, capacities, eos=()):
    models = (stack.oracle, *stack.drafts)[: len(capacities.widths)]
    context = stack.oracle.config.n_positions
    limits = [min(len(p) + new_tokens, context) for p in prompts]
    return models, first_state(models, prompts, limits, eos, capacities)


def run(stack, prompts, new_tokens, sampling, plan, policy=None, eos=(), stop_at=None):
    """Decode, and return the final state and each row's continuation."""
    capacities = Capacities.of(plan, TEXT)
    models, state = start(stack, prompts, new_tokens, capacities, eos)
    tables = stack.tables if plan.ngram is not None else None
    policy = policy or Policy.of(plan)
    yield_at = state.limit + 0 if stop_at is None else jnp.full_like(state.limit, stop_at)
    state = engine.decode(models, tables, state, sampling, policy, yield_at, capacities=capacities)
    return state, continuations(state, prompts)


def continuations(state, prompts) -> list[list[int]]:
    # Copied at once: JAX takes longer to slice rows one by one than the toys to write them.
    text, length = np.array(state.text), np.array(state.length)
    return [text[row, len(p) : length[row]].tolist() for row, p in enumerate(prompts)]


def sampling_for(name: str, batch: int) -> Sampling:
    return Sampling.create(batch, **SAMPLINGS[name], seed=[17 + 5 * row for row in range(batch)])


def assert_same(got, expected, margins):
    """Equal, or different first where the choice was a near-tie."""
    if got != expected:
        first = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
        assert margins[first] < 1e-4, f"differs at {first}, margin {margins[first]}"
        pytest.fail(f"near-tie at {first} (margin {margins[first]:.2e}): choose another seed")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_baseline_equals_cache_free_decoding(sampling):
    oracle = toys.model(0)
    stack = toys.stack("never", drafts=0, ngram=False)
    for prompt in PROMPTS:
        _, (tokens,) = run(stack, [prompt], 25, sampling_for(sampling, 1), Plan.baseline())
        expected, margin = reference.generate(oracle, prompt, 25, **SAMPLINGS[sampling], seed=17)
        assert margin > 1e-4  # the reference rounds differently; keep clear of near-ties
        assert tokens == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_any_draft_and_policy_write_what_the_oracle_would(drafts, batch):
    rounds: dict[str, list[int]] = {"always": [], "between": [], "never": []}
    prompts = PROMPTS[-batch:]
    for agreement in rounds:
        stack = toys.stack(agreement, drafts)
        for name in SAMPLINGS:
            sampling = sampling_for(name, batch)
            state, _ = run(stack, prompts, 30, sampling, Plan.baseline())
            expected = continuations(state, prompts)
            margins = [state.trace.margin[row, len(p) :] for row, p in enumerate(prompts)]
            for policy in policies(drafts):
                state, got = run(stack, prompts, 30, sampling, plan_for(drafts), policy)
                for row in range(batch):
                    assert len(got[row]) == 30
                    assert_same(got[row], expected[row], margins[row])
                rounds[agreement].append(int(state.rounds))
    if drafts:
        # The drafts that agree save passes, the others do not (or there was nothing to test).
        assert sum(rounds["always"]) < sum(rounds["between"]) < sum(rounds["never"])
        assert rounds["always"][1] == 8  # the chain: 4 tokens a round, 30 in all


def test_rows_of_a_batch_are_what_they_would_be_alone():
    stack = toys.stack("between")
    options = dict(temperature=[0.0, 1.0, 0.7], top_k=[None, 12, None], top_p=[None, None, 0.9])
    together = Sampling.create(3, **options, seed=[1, 2, 3])
    _, batch = run(stack, PROMPTS, 20, together, plan_for(1))
    for row, prompt in enumerate(PROMPTS):
        own = {name: values[row] for name, values in options.items()}
        _, (alone,) = run(stack, [prompt], 20, Sampling.create(1, **own, seed=row + 1), plan_for(1))
        assert batch[row] == alone


@jax.jit
def fresh_cache(model, tokens):
    """Keys and values of texts ``[B, T]``, computed in one pass."""
    batch, size = tokens.shape
    mask = jnp.broadcast_to(jnp.tri(size, dtype=bool), (batch, size, size))
    return model(tokens, mask=mask, cache=model.init_cache(batch, size))[1]


def assert_fresh(models, state):
    """What caches hold is what one pass over the text computes."""
    for model, cache in zip(models, state.caches, strict=True):
        fresh = fresh_cache(model, state.text[:, :TEXT])
        for ours, expected in zip(toys.by_slot(cache), toys.by_slot(fresh), strict=True):
            for row, seen in enumerate(cache.length.tolist()):
                np.testing.assert_allclose(
                    ours[row, :seen], expected[row, :seen], rtol=2e-4, atol=2e-4
                )


@pytest.mark.parametrize("agreement", ["always", "between", "never"])
def test_after_any_round_each_cache_equals_a_fresh_prefill(agreement):
    stack = toys.stack(agreement, drafts=2)
    models = (stack.oracle, *stack.drafts)
    for stop_at in (12, 17, 26):
        state, _ = run(stack, PROMPTS, 30, sampling_for("top_k", 3), plan_for(2), stop_at=stop_at)
        assert int(state.length.max()) < max(len(p) for p in PROMPTS) + 30
        np.testing.assert_array_equal(state.caches[0].length, state.length - 1)
        for cache in state.caches:
            assert (cache.length < state.length).all() and int(cache.length.max()) > 0
        assert_fresh(models, state)


@pytest.mark.parametrize("cached", [0, 14])
def test_a_prompt_of_any_length_is_in_the_caches_before_the_first_round(cached):
    """From an empty cache and an earlier turn's, up to a buffer's very end."""
    stack = toys.stack("between", drafts=1)
    plan = plan_for(1, chunk=4)
    capacities = Capacities.of(plan, TEXT)
    assert capacities.scratch(1) < capacities.prefill_rows(1) == 16  # wide passes get no room
    fill = jax.jit(engine.prefill, static_argnames="capacities")
    text = np.random.default_rng(3).integers(0, toys.VOCAB, TEXT).tolist()

    def filled(length, caches):
        models = (stack.oracle, *stack.drafts)
        state = first_state(models, [text[:length]], [TEXT], (), capacities, caches=caches)
        sampling = sampling_for("greedy", 1)
        return fill(models, stack.tables, state, sampling, Policy.of(plan), capacities=capacities)

    earlier = filled(cached + 1, None).caches if cached else None
    for length in range(cached + 2, TEXT):
        state = filled(length, earlier)
        oracle, draft = state.caches
        assert oracle.length.tolist() == [length - 1]
        # A draft is given its wide passes, and the rest when it first drafts.
        begun = int(earlier[1].length[0]) if earlier else 0
        wide, single = prefill_passes(length - 1 - begun, plan.chunk)
        assert int(draft.length[0]) == min(begun + wide * 16, length - 1)
        assert length - 1 - int(draft.length[0]) <= single * plan.chunk < 16
        assert_fresh((stack.oracle, *stack.drafts), state)


def test_a_draft_that_was_switched_off_is_caught_up():
    stack = toys.stack("always", drafts=1)
    sampling, plan = sampling_for("greedy", 1), plan_for(1)
    capacities = Capacities.of(plan, TEXT)
    models, state = start(stack, PROMPTS[:1], 40, capacities)
    on = policies(1)[1]  # the chain: 4 tokens a round from a draft that always agrees
    off = dataclasses.replace(on, rounds=jnp.zeros_like(on.rounds), levels=jnp.int32(0))

    def advance(state, policy, until):
        until = jnp.full_like(state.limit, until)
        return engine.decode(
            models, stack.tables, state, sampling, policy, until, capacities=capacities
        )

    state = advance(state, off, 25)
    assert int(state.length[0]) - int(state.caches[1].length[0]) <= capacities.trunk + 1
    # Without the catching up that a switched-off draft gets each round, it would lag by more:
    behind = dataclasses.replace(state.caches[1], length=jnp.zeros_like(state.length))
    state = dataclasses.replace(state, caches=(state.caches[0], behind))
    before = int(state.rounds)
    state = advance(state, on, 43)
    assert int(state.rounds) - before <= 5  # for 18 tokens: the draft is back at once
    _, (expected,) = run(stack, PROMPTS[:1], 40, sampling, Plan.baseline())
    assert continuations(state, PROMPTS[:1])[0] == expected


def test_chunks_take_the_same_steps_as_one_run():
    stack, sampling, plan = toys.stack("between"), sampling_for("top_p", 3), plan_for(1)
    whole, _ = run(stack, PROMPTS, 30, sampling, plan)
    capacities = Capacities.of(plan, TEXT)
    models, state = start(stack, PROMPTS, 30, capacities)
    chunks = 0
    while (state.finish == engine.RUNNING).any():
        state = engine.decode(
            models,
            stack.tables,
            state,
            sampling,
            Policy.of(plan),
            state.length + 4,
            capacities=capacities,
        )
        chunks += 1
    assert chunks > 3
    assert int(state.rounds) == int(whole.rounds)
    np.testing.assert_array_equal(state.trace.passes, whole.trace.passes)
    for row in range(3):
        end = int(whole.length[row])
        np.testing.assert_array_equal(state.text[row, :end], whole.text[row, :end])
        np.testing.assert_array_equal(state.trace.origin[row, :end], whole.trace.origin[row, :end])


def test_end_of_text_ends_the_text_wherever_it_falls_in_the_tree():
    stack, sampling = toys.stack("always"), sampling_for("top_k", 1)
    _, (free,) = run(stack, PROMPTS[:1], 30, sampling, Plan.baseline())
    ended = set()
    for end in range(2, 18):
        if free[end] in free[:end]:
            continue
        # A chain of three drafted tokens: every round commits four.
        state, (tokens,) = run(
            stack, PROMPTS[:1], 30, sampling, plan_for(1), policies(1)[1], eos=(free[end],)
        )
        assert tokens == free[: end + 1]
        assert int(state.finish[0]) == engine.ENDED
        lengths = state.trace.length[: int(state.rounds), 0]
        ended.add(3 + end + 1 - int(lengths[-1]))  # tokens committed by the last round
    assert ended == {1, 2, 3, 4}, "the end did not fall at every depth"


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_accepted_paths_do_not_cross_the_token_limit(new_tokens):
    stack, sampling = toys.stack("always"), sampling_for("greedy", 3)
    state, got = run(stack, PROMPTS, new_tokens, sampling, plan_for(1))
    _, expected = run(stack, PROMPTS, 12, sampling, Plan.baseline())
    assert got == [tokens[:new_tokens] for tokens in expected]
    assert (state.finish == engine.LIMITED).all()


@pytest.mark.parametrize("agreement", ["always", "never"])
def test_the_text_reaches_the_last_position_of_the_context(agreement):
    stack = toys.stack(agreement, n_positions=20)
    prompts = [[1, 2, 3], list(range(19)), list(range(20))]
    sampling = sampling_for("top_k", 3)
    state, got = run(stack, prompts, 50, sampling, plan_for(1))
    assert state.length.tolist() == [20, 20, 20]
    expected, _ = reference.generate(stack.oracle, prompts[0], 50, **SAMPLINGS["top_k"], seed=17)
    assert got[0] == expected and len(expected) == 17
    assert len(got[1]) == 1 and got[2] == []


def test_a_draft_with_a_shorter_context_steps_aside():
    oracle = toys.model(0)
    draft = toys.model(0, n_positions=16)
    stack = dataclasses.replace(toys.stack("always"), drafts=(draft,))
    sampling = sampling_for("greedy", 1)
    state, (tokens,) = run(stack, PROMPTS[:1], 40, sampling, plan_for(1))
    expected, _ = reference.generate(oracle, PROMPTS[0], 40)
    assert tokens == expected
    beyond = state.trace.passes[: int(state.rounds)][
        state.trace.length[: int(state.rounds), 0] > 20
    ]
    assert len(beyond) > 3 and (beyond[:, 1] == 0).all()


def test_origins_name_the_stage_that_proposed():
    sampling = sampling_for("greedy", 1)
    for agreement, expected in [("always", {0, 1}), ("never", {0})]:
        stack = toys.stack(agreement, ngram=False)
        plan = plan_for(1, ngram=None)
        state, _ = run(stack, PROMPTS[:1], 30, sampling, plan)
        origins = set(state.trace.origin[0, 3:33].tolist())
        assert origins == expected or (agreement == "never" and origins <= {0, 1})
        # Exactly one token of every round is the oracle's own.
        assert int((state.trace.origin[0, 3:33] == 0).sum()) == int(state.rounds)


def test_look_up_copies_what_followed_the_same_words():
    """A text that repeats itself and an oracle that goes on repeating it."""
    oracle = toys.model(0)
    prompt = [3, 8, 21, 40, 17, 33, 3, 8, 21, 40]
    # The oracle's own loop: decode until it repeats itself, greedily.
    stack = dataclasses.replace(toys.stack("never", drafts=0, ngram=False), oracle=oracle)
    plan = plan_for(0, ngram=dataclasses.replace(NGRAM, branch=0))
    sampling = sampling_for("greedy", 1)
    _, (expected,) = run(stack, [prompt], 45, sampling, Plan.baseline())
    state, (got,) = run(stack, [prompt], 45, sampling, plan)
    assert got == expected
    origin = state.trace.origin[0, len(prompt) : len(prompt) + 45].tolist()
    assert 1 in origin, "the oracle never repeated itself; choose another prompt"
    text = prompt + got
    for place, who in enumerate(origin, start=len(prompt)):
        if who == 1:  # the token did follow the same word before
            assert (text[place - 1], text[place]) in zip(
                text[: place - 1], text[1:place], strict=True
            )
    assert int(state.rounds) == origin.count(0)


class Counting:
    """A model that counts how often it is traced."""

    def __init__(self, inner):
        self.inner, self.traces = inner, 0
        self.config, self.init_cache = inner.config, inner.init_cache

    def __call__(self, *args, **kwargs):
        self.traces += 1
        return self.inner(*args, **kwargs)


jax.tree_util.register_pytree_node(Counting, lambda c: ((), c), lambda c, _: c)


def test_four_traces_serve_prompts_policies_and_all_options():
    """One where all is greedy, one with temperature and top-k, one with top-p and min-p too, and
    one with processors."""
    stack = toys.stack("between")
    models = tuple(Counting(m) for m in (stack.oracle, *stack.drafts))
    capacities = Capacities.of(plan_for(1), TEXT)

    def traces(prompt, policy, **options) -> tuple[int, ...]:
        state = first_state(models, [prompt], [len(prompt) + 5], (), capacities)
        sampling = Sampling.create(1, **options)
        arguments = (models, stack.tables, state, sampling, policy, state.limit + 0)
        engine.decode.trace(*arguments, capacities=capacities)
        return tuple(m.traces for m in models)

    prompts, kinds = [[1, 2, 3], [4] * 20, [9, 8], [9]], policies(1)
    options = [
        [dict(seed=1), dict(seed=2, top_k=3), dict(min_p=0.5), dict(seed=4)],
        [
            dict(seed=2, temperature=1.0),
            dict(seed=3, temperature=0.5, top_k=3),
            dict(temperature=1.5, top_k=20),
            dict(temperature=0.1),
        ],
        [
            dict(temperature=1.0, top_p=0.9),
            dict(seed=3, temperature=0.5, top_p=0.8, top_k=3),
            dict(temperature=1.5, min_p=0.1, top_k=20),
            dict(temperature=0.1, top_p=0.9, min_p=0.2),
        ],
        [
            dict(repetition_penalty=1.3),
            dict(temperature=1.0, typical_p=0.5),
            dict(bad_words_ids=[[1], [3, 4]], min_new_tokens=3),
            dict(temperature=1.5, top_k=5, logit_bias={5: -1.0}, presence_penalty=0.5),
        ],
    ]
    counts = [
        [traces(*each, **own) for *each, own in zip(prompts, kinds, group, strict=True)]
        for group in options
    ]
    assert all(len(set(group)) == 1 for group in counts)
    assert counts[0][0] < counts[1][0] < counts[2][0] < counts[3][0]


def lowered(stack, batch, place=lambda tree: tree, plan=None):
    # As many rows as a head has channels, and scores would have the shape of a cache.
    plan = plan or plan_for(1, width=9, chunk=12)
    capacities = Capacities.of(plan, TEXT)
    models, state = start(stack, PROMPTS[:batch], 20, capacities)
    parts = Flat.of((models, stack.tables))
    arguments = (parts, state, sampling_for("top_k", batch), Policy.of(plan), state.limit)
    caches = {x.shape for c in state.caches for x in (*c.keys, *c.values)}
    return batches.decode.lower(*place(arguments), capacities=capacities), caches


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "batch, plan", [(1, Plan.baseline()), (1, None), (3, None)], ids=["plain", "tree", "batch"]
)
def test_the_loop_copies_no_cache(batch, plan, turned):
    stack = toys.stack("between")
    if turned:
        config = stack.oracle.config
        oracle, draft = (GPT2(config, turned=True, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        stack = dataclasses.replace(stack, oracle=oracle, drafts=(draft,))
    program, caches = lowered(stack, batch, plan=plan)
    hlo = program.compile().as_text()
    assert "while(" in hlo
    noise = (batch, plan_for(1).depth + 1, toys.VOCAB)  # kept as well, though not on a GPU
    assert cache_sized_copies(hlo, [*caches, noise]) == []


def test_the_copy_counter_sees_a_copy():
    def body(carry):
        step, buffer = carry
        return step + 1, jnp.roll(buffer, 1, axis=2)

    def loop(buffer):
        return jax.lax.while_loop(lambda c: c[0] < 5, body, (0, buffer))[1]

    shape = (1, 4, 32, 8)
    hlo = jax.jit(loop).lower(jnp.zeros(shape)).compile().as_text()
    assert cache_sized_copies(hlo, [shape])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_copies_no_cache_on_a_gpu(batch):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the extra 'aot'")
    device = gpu_device("h200")
    program, caches = lowered(
        toys.stack("between"), batch, place=lambda tree: described(tree, device)
    )
    hlo = program.compile().as_text()
    assert "while(" in hlo
    assert cache_sized_copies(hlo, caches) == []


def test_samples_have_the_oracles_distribution():
    """Chi-square over 4096 seeds of the first two tokens against exact probabilities, for
    plain and staged decoding; significance 1e-4."""
    vocab, batch, calls = 6, 16, 256
    oracle = toys.model(3, vocab_size=vocab, std=0.3)
    draft = toys.blend(oracle, 0.3)
    stack = dataclasses.replace(
        toys.stack("never", drafts=0, ngram=False),
        oracle=oracle,
        drafts=(draft,),
        ngram=toys.katz(vocab),
    )
    prompt, temperature, top_k = [1, 4, 2], 0.9, 5
    expected = _pair_probabilities(oracle, prompt, temperature, top_k)
    for plan in (Plan.baseline(), plan_for(1, depth=3, nodes=12, width=6)):
        seen = np.zeros(vocab * vocab)
        saved = 0
        for call in range(calls):
            sampling = Sampling.create(
                batch,
                temperature=temperature,
                top_k=top_k,
                seed=[call * batch + row for row in range(batch)],
            )
            state, rows = run(stack, [prompt] * batch, 3, sampling, plan)
            saved += 3 * batch - int(state.rounds) * batch
            for first, second, _ in rows:
                seen[first * vocab + second] += 1
        if plan.drafts:
            assert saved > 0, "nothing was accepted, so nothing was tested"
        live = expected > 0
        assert seen[~live].sum() == 0
        statistic = np.sum((seen - batch * calls * expected)[live] ** 2 / expected[live])
        statistic /= batch * calls
        degrees = live.sum() - 1
        # Wilson and Hilferty's approximation of the 0.9999 quantile.
        quantile = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
        assert statistic < quantile


def _pair_probabilities(model, prompt, temperature, top_k) -> np.ndarray:
    """Exact probability of each pair of next tokens."""

    def next_probs(text):
        logits = np.asarray(model(jnp.asarray([text], jnp.int32))[0][0, -1])
        weights = np.exp(reference.warp(logits, temperature, top_k, None))
        return weights / weights.sum()

    first = next_probs(prompt)
    return np.concatenate([first[v] * next_probs([*prompt, v]) for v in range(len(first))])


def test_exact_probabilities_are_those_of_transformers(tmp_path):
    """What the chi-square test holds the samples to, against an independent implementation."""
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel
    from transformers.generation import logits_process as hf

    oracle = toys.model(3, vocab_size=6, std=0.3)
    save_model(oracle, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()

    def next_probs(text):
        with torch.no_grad():
            scores = theirs(torch.tensor([text])).logits[:, -1]
        scores = hf.TopKLogitsWarper(5)(None, hf.TemperatureLogitsWarper(0.9)(None, scores))
        return scores.softmax(-1)[0].double().numpy()

    first = next_probs([1, 4, 2])
    expected = np.concatenate([first[v] * next_probs([1, 4, 2, v]) for v in range(6)])
    np.testing.assert_allclose(_pair_probabilities(oracle, [1, 4, 2], 0.9, 5), expected, atol=1e-5)
