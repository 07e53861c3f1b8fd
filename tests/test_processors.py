"""Logit processors: each equals its definition, and all of them are lossless under speculation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

from ssd_jax import decode as engine
from ssd_jax.batch import first_state
from ssd_jax.errors import SamplingError
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.processors import History, Processors, process
from ssd_jax.sampling import Sampling

TEXT, VOCAB = 64, toys.VOCAB
PLAN = Plan(
    width=8,
    drafts=(DraftPlan(rounds=2, width=3, branch=3, threshold=0.0),),
    ngram=NGramPlan(levels=2, width=3, branch=2, match=3, match_prob=(0.2, 0.4, 0.6)),
    depth=5,
    nodes=24,
    floor=0.0,
    chunk=8,
)
PROMPTS = [[1, 2, 3], [7], [5, 5, 4, 3, 9, 11, 2, 5, 5, 4, 30]]
EOS = (3, 8)
OPTIONS = {
    "repetition": dict(repetition_penalty=1.7),
    "encouraged repetition": dict(repetition_penalty=0.8),
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=0.7, presence_penalty=-0.3),
    "bias": dict(logit_bias={4: 3.0, 9: -np.inf, 50: -2.5}),
    "words": dict(bad_words_ids=[[5], [3], [11, 2], [9, 4, 4], [2, 5, 5, 4, 30]]),
    "length": dict(min_new_tokens=6),
    "all": dict(
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={3: 5.0, 7: -1.0},
        bad_words_ids=[[4], [5, 5], [8]],
        min_new_tokens=12,
    ),
}


def by_transformers(logits, text, start, options, eos=EOS):
    """What ``transformers`` makes of the logits ``[V]`` after a text, and vLLM of its own two."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    ids, scores = torch.tensor([text]), torch.tensor(logits)[None]
    vocab = len(logits)
    if bias := options.get("logit_bias"):
        bias = {(token,): float(value) for token, value in bias.items() if token < vocab}
        if bias:
            scores = hf.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if penalty := options.get("repetition_penalty"):
        scores = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    counts = torch.bincount(ids[0, start:], minlength=vocab)
    scores = scores - options.get("frequency_penalty", 0.0) * counts
    scores = scores - options.get("presence_penalty", 0.0) * (counts > 0)
    if words := options.get("bad_words_ids"):
        words = [word for word in words if max(word) < vocab and word not in [[e] for e in eos]]
        if words:
            scores = hf.NoBadWordsLogitsProcessor(words, list(eos))(ids, scores)
    if count := options.get("min_new_tokens"):
        scores = hf.MinNewTokensLengthLogitsProcessor(start, count, list(eos))(ids, scores)
    return scores[0].numpy()


@pytest.mark.parametrize("vocab", [1, VOCAB])
def test_processors_equal_transformers_after_each_path(vocab):
    """For nodes of any depth below texts of any length, tokens repeated on the way."""
    rng = np.random.default_rng(vocab)
    batch, width, reach = len(OPTIONS), 6, 7
    texts = [rng.integers(0, min(vocab, 12), 1 + rng.integers(20)).tolist() for _ in range(batch)]
    starts = [int(rng.integers(1, len(text) + 1)) for text in texts]
    depths = rng.integers(0, 6, (batch, width))
    paths = [[rng.integers(0, min(vocab, 12), d).tolist() for d in row] for row in depths]
    logits = rng.normal(0, 2, (batch, width, vocab)).astype(np.float32)
    logits[:, 0] = np.round(logits[:, 0])
    logits[:, 1, : vocab // 2] = -np.inf

    per_row = {name: [own.get(name) for own in OPTIONS.values()] for name in OPTIONS["all"]}
    processors = Processors.create(batch, **per_row)
    assert processors is not None and processors.reach <= reach
    padded = np.zeros((batch, 24), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    recent = [
        [([-1] * reach + text + path)[: -reach - 1 : -1] for path in row]
        for text, row in zip(texts, paths, strict=True)
    ]
    lengths = np.array([len(text) for text in texts])
    history = History.of(processors, jnp.asarray(padded), jnp.asarray(starts), lengths, vocab)
    new = lengths[:, None] + depths - np.array(starts)[:, None]
    eos = jnp.asarray([[*EOS, -1]] * batch)
    got = process(
        jnp.asarray(logits), processors, history, jnp.asarray(recent), depths, jnp.asarray(new), eos
    )
    for row, options in enumerate(OPTIONS.values()):
        for column, path in enumerate(paths[row]):
            known = (texts[row] + path, starts[row], options)
            expected = by_transformers(logits[row, column], *known)
            np.testing.assert_allclose(got[row, column], expected, rtol=1e-5, atol=1e-5)


def run(stack, plan, prompts, options, new_tokens=20, eos=EOS):
    """Each row's continuation, its margins and the rounds that it took."""
    capacities = Capacities.of(plan, TEXT)
    models = (stack.oracle, *stack.drafts)[: len(capacities.widths)]
    limits = [len(prompt) + new_tokens for prompt in prompts]
    state = first_state(models, prompts, limits, eos, capacities)
    sampling = Sampling.create(len(prompts), **options)
    tables = stack.tables if plan.ngram is not None else None
    arguments = (models, tables, state, sampling, Policy.of(plan), state.limit + 0)
    state = jax.device_get(engine.decode(*arguments, capacities=capacities))
    rows = range(len(prompts))
    spans = [slice(len(prompts[row]), int(state.length[row])) for row in rows]
    texts = [state.text[row, spans[row]].tolist() for row in rows]
    return texts, [state.trace.margin[row, spans[row]] for row in rows], int(state.rounds)


@pytest.fixture(scope="module")
def stack():
    return toys.stack("between")


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_decoding_follows_transformers(stack, name):
    options, prompt = OPTIONS[name], PROMPTS[2]
    for temperature in (0.0, 0.9):
        chosen = dict(temperature=temperature, seed=11)
        (got, *_), *_ = run(stack, Plan.baseline(), [prompt] * 3, options | chosen)

        def adjust(text, logits, options=options):
            return by_transformers(logits, text, len(prompt), options)

        expected, margin = reference.generate(
            stack.oracle, prompt, 20, eos=EOS, adjust=adjust, **chosen
        )
        assert margin > 1e-4  # the reference rounds differently; keep clear of near-ties
        assert got == expected


def random_options(rng) -> dict:
    """Every option for each of three rows, or not."""
    choices = dict(
        temperature=[0.0, 0.7, 1.3],
        top_k=[None, 1, 7],
        top_p=[None, 0.6, 0.95],
        min_p=[None, 0.02, 0.3],
        typical_p=[None, 0.3, 0.9],
        repetition_penalty=[None, 0.7, 1.3, 2.0],
        presence_penalty=[None, -0.5, 1.0],
        frequency_penalty=[None, -0.2, 0.5],
        min_new_tokens=[None, 0, 5, 100],
        seed=[0, 1, 2, 3, 2**63],
    )
    options = {
        name: [values[i] for i in rng.integers(0, len(values), 3)]
        for name, values in choices.items()
    }
    words = [rng.integers(0, VOCAB, rng.integers(1, 4)).tolist() for _ in range(6)]
    biases = dict(zip(range(0, VOCAB, 5), rng.normal(0, 3, 11).tolist(), strict=True))
    options["bad_words_ids"] = [None, words, [list(EOS), *words[:2]]]
    options["logit_bias"] = [biases, None, {7: float("-inf"), 2: 1.5}]
    return options


def test_speculation_writes_what_plain_decoding_writes(stack):
    """Random combinations, each of its rows another one; all of them are two programs."""
    rng = np.random.default_rng(8)
    rounds = tokens = differing = 0
    seen = set()
    for _ in range(25):
        options = random_options(rng)
        expected, margins, _ = run(stack, Plan.baseline(), PROMPTS, options)
        got, _, taken = run(stack, PLAN, PROMPTS, options)
        for text, plain, margin in zip(got, expected, margins, strict=True):
            if text != plain:
                first = next(
                    i for i, pair in enumerate(zip(text, plain, strict=False)) if len(set(pair)) > 1
                )
                assert margin[first] < 1e-4, (
                    f"differs at {first}, margin {margin[first]}: {options}"
                )
                differing += 1
            seen.add(tuple(plain))
        rounds, tokens = rounds + taken, tokens + max(map(len, got))
    assert rounds < 0.8 * tokens, "nothing was accepted, so nothing was tested"
    assert differing <= 1 and len(seen) > 40


def test_where_every_token_is_excluded_the_first_is_taken(stack):
    nothing = dict.fromkeys(range(VOCAB), -np.inf)
    options = dict(logit_bias=[nothing, nothing, None], temperature=[0.0, 1.0, 1.0], typical_p=0.9)
    texts, *_ = run(stack, PLAN, PROMPTS, options)
    assert texts[:2] == [[0] * 20] * 2 and len(set(texts[2])) > 1


def test_no_end_of_text_before_its_time():
    stack = toys.stack("always")
    bias = {token: 30.0 for token in EOS}  # nothing else is ever said
    for plan in (Plan.baseline(), PLAN):
        texts, *_ = run(stack, plan, PROMPTS, dict(logit_bias=bias, min_new_tokens=[0, 3, 7]))
        assert [len(text) for text in texts] == [1, 4, 8]
        assert all(text[-1] in EOS and not set(text[:-1]) & set(EOS) for text in texts)


def test_lists_come_in_few_sizes():
    def shapes(**options):
        processors = Processors.create(2, **options)
        assert processors is not None
        return processors.biased.shape, processors.banned.shape

    few = shapes(bad_words_ids=[[1]])
    assert few == shapes(logit_bias={i: 1.0 for i in range(16)})
    assert few == shapes(bad_words_ids=[[[1, 2, 3, 4]] * 8, None], min_new_tokens=2)
    more = shapes(bad_words_ids=[[1] * 5] * 9, logit_bias=[{i: 1.0 for i in range(17)}, None])
    assert more == ((2, 32), (2, 16, 8))


def test_neutral_values_are_no_processors():
    off = dict(repetition_penalty=1.0, presence_penalty=0, frequency_penalty=[0.0, None])
    off |= dict(logit_bias={}, bad_words_ids=[], min_new_tokens=0)
    assert Processors.create(2, **off) is None
    always = Processors.create(2, always=True)
    assert (
        dataclasses.asdict(always).keys()
        == dataclasses.asdict(Processors.create(2, **OPTIONS["all"])).keys()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": True},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": "0.5"},
        {"frequency_penalty": [0.1, 0.2]},
        {"logit_bias": [(1, 2.0)]},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {VOCAB: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1.5: 1.0}},
        {"bad_words_ids": 3},
        {"bad_words_ids": "word"},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[1, -2]]},
        {"bad_words_ids": [[1, VOCAB]]},
        {"bad_words_ids": [[[1]], [[2]]]},
        {"bad_words_ids": ["word"]},
        {"min_new_tokens": -1},
        {"min_new_tokens": 1.5},
        {"min_new_tokens": True},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SamplingError, match=next(iter(options))):
        Sampling.create(1, vocab_size=VOCAB, **options)
