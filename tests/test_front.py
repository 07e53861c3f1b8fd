"""Batches, stops, streams, log-probabilities and sessions write what one plain call writes.

All calls have one text capacity and ask for the same number of alternatives, so that the whole
module compiles a handful of programs.
"""

import dataclasses
import gc
import os
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax import run as running
from ssd_jax.errors import PromptError, SamplingError
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.stack import Stack

STAGED = Plan(
    width=6,
    drafts=(DraftPlan(rounds=2, width=2, branch=2, threshold=0.0),),
    ngram=NGramPlan(levels=2, width=3, branch=2, match=3),
    depth=4,
    nodes=16,
    chunk=8,
    narrower=(1,),
)
PLANS = {"baseline": Plan(chunk=8), "speculative": Plan.speculative(2), "staged": STAGED}
KINDS = {"greedy": {}, "sampled": dict(temperature=1.2, top_k=60, seed=5)}
PROMPTS = ["def f(x):", "é", "return x + 1\nreturn x"]
NEW = 24
ALTERNATIVES = 3


@pytest.fixture(scope="module")
def stack():
    tokenizer = toys.byte_tokenizer()
    oracle = toys.model(0, vocab_size=tokenizer.vocab_size, layers=1, n_positions=64)
    draft = toys.blend(oracle, 0.1)
    return Stack(oracle, (draft,), toys.katz(tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="module")
def plain(stack):
    """Plain decoding of one prompt, each asked for once."""
    known = {}

    def decode(prompt, **options):
        key = (str(prompt), *sorted((k, str(v)) for k, v in options.items()))
        if key not in known:
            known[key] = call(stack, prompt, "baseline", **options)
        return known[key]

    return decode


def call(stack, prompt, mode, **options):
    options = dict(max_new_tokens=NEW, logprobs=ALTERNATIVES) | options
    return ssd_jax.generate(stack, prompt, mode=mode, plan=PLANS[mode], **options)


@pytest.mark.parametrize("mode", PLANS)
def test_a_batch_writes_what_each_prompt_gives_alone(stack, plain, mode):
    """Rows unlike each other in everything, in two batches of a row too many."""
    prompts = [*PROMPTS, PROMPTS[0], [7, 8]]
    own = dict(
        temperature=[0.0, 1.0, 0.7, 1.5, 1.0],
        top_k=[None, 20, None, None, 9],
        top_p=[None, None, 0.9, None, None],
        seed=[0, 1, 2, 3, 2**40],
        max_new_tokens=[24, 5, 20, 16, 1],
    )
    ends = plain(prompts[2], **{name: values[2] for name, values in own.items()}).tokens[11]
    configs = [ssd_jax.GenerationConfig(eos_token_id=ends if i == 2 else ()) for i in range(5)]
    results = call(stack, prompts, mode, config=configs, batch_size=3, **own)
    assert results[2].finish_reason == "eos" and results[2].stop_reason == ends
    for i, result in enumerate(results):
        alone = plain(
            prompts[i],
            eos_token_id=configs[i].eos_token_id,
            **{name: values[i] for name, values in own.items()},
        )
        assert (result.tokens, result.text) == (alone.tokens, alone.text)
        assert result.finish_reason == alone.finish_reason
        assert result.stats.new_tokens == sum(result.stats.round_tokens) == len(result.tokens)


def test_each_prompt_has_its_own_processors(stack, plain):
    """What no prompt may say is what each says without."""
    free = [plain(prompt).tokens for prompt in PROMPTS[::2]]
    own = dict(
        bad_words_ids=[[free[0][0]], free[0][4:6]],
        logit_bias=[{free[1][0]: -50.0}, None],
        repetition_penalty=[1.3, None],
        frequency_penalty=[None, 0.4],
        min_new_tokens=[3, 0],
        temperature=[0.0, 0.9],
        min_p=[None, 0.02],
        seed=[0, 4],
    )
    shared = {"bad_words_ids": own["bad_words_ids"]}
    each = [shared | {k: v[i] for k, v in own.items() if k not in shared} for i in range(2)]
    alone = [plain(p, **options).tokens for p, options in zip(PROMPTS[::2], each, strict=True)]
    together = call(stack, PROMPTS[::2], "staged", **own)
    assert [result.tokens for result in together] == alone != free
    assert not any(free[0][0] in tokens for tokens in alone)
    assert free[1][0] not in alone[0]
    with pytest.raises(SamplingError, match="vocabulary"):
        call(stack, PROMPTS[0], "baseline", logit_bias={10**6: 1.0})


@pytest.mark.parametrize("options", [dict(logit_bias={10**6: 1.0}), dict(bad_words_ids=[[10**6]])])
def test_one_prompts_mistake_is_found_before_any_batch_runs(stack, monkeypatch, options):
    monkeypatch.setattr(running.Run, "__init__", lambda *_, **__: pytest.fail("ran"))
    configs = [ssd_jax.GenerationConfig(), ssd_jax.GenerationConfig(**options)]
    with pytest.raises(SamplingError, match="vocabulary"):
        ssd_jax.generate(stack, [[1], [2, 3]], configs, batch_size=1)


def test_samples_are_what_their_seeds_give_alone(stack, plain):
    options = dict(temperature=1.2, top_k=60)
    several = call(stack, PROMPTS[0], "staged", num_return_sequences=3, seed=5, **options)
    for i, result in enumerate(several):
        assert result.tokens == plain(PROMPTS[0], seed=5 + i, **options).tokens
    assert len({result.text for result in several}) == 3
    both = call(stack, PROMPTS[:2], "staged", num_return_sequences=3, seed=5, **options)
    assert [r.tokens for r in both[:3]] == [r.tokens for r in several] and len(both) == 6
    assert both[4].tokens == plain(PROMPTS[1], seed=6, **options).tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", PLANS)
def test_stops_end_the_text_where_they_complete(stack, plain, mode, kind):
    prompt, options = PROMPTS[0], KINDS[kind] | dict(eos_token_id=())
    free = plain(prompt, **options)
    decode = stack.tokenizer.decode
    place = next(
        i
        for i in range(6, NEW - 3)  # three tokens whose text is new, a stop across boundaries
        if "\ufffd" not in decode(free.tokens[i : i + 3])
        and decode(free.tokens[i : i + 3]) not in decode(free.tokens[: i + 2])
    )
    string = decode(free.tokens[place : place + 3])
    sequence = tuple(free.tokens[place : place + 2])
    first = next(
        i for i in range(NEW) if tuple(free.tokens[max(0, i - 1) : i + 1]) == sequence
    )  # where the sequence first completes
    for stops, kept, reason in [
        (dict(stop_strings=["\x00\x01", string]), place + 3, string),
        (dict(stop_token_sequences=[sequence, (0,) * 30]), first + 1, sequence),
    ]:
        pieces = []
        stopped = call(stack, prompt, mode, on_text=pieces.append, **options, **stops)
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", reason)
        assert stopped.tokens == free.tokens[:kept]
        assert stopped.text == "".join(pieces)
        if reason is string:
            assert decode(stopped.tokens).startswith(stopped.text + string)
        else:
            assert stopped.text == decode(free.tokens[: kept - 2]).rstrip("\ufffd")
        assert sum(stopped.stats.round_tokens) == stopped.stats.new_tokens == kept
        assert len(stopped.logprobs) == len(stopped.origins) == kept


def test_one_row_stops_and_the_others_go_on(stack, plain):
    free = [plain(prompt, **KINDS["sampled"]) for prompt in PROMPTS]
    stop = tuple(free[1].tokens[2:4])
    results = call(stack, PROMPTS, "staged", stop_token_sequences=[stop], **KINDS["sampled"])
    assert [r.finish_reason for r in results] == ["length", "stop", "length"]
    assert results[1].tokens == free[1].tokens[:4]
    assert results[0].tokens == free[0].tokens and results[2].tokens == free[2].tokens


def test_the_time_is_up_between_two_looks(stack, plain, monkeypatch):
    """A clock that moves a second whenever it is looked at."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(running.time, "perf_counter", lambda: float(next(ticks)))
    for mode in PLANS:
        late = call(stack, PROMPTS[0], mode, max_time=2)
        assert late.finish_reason == "time" and 0 < len(late.tokens) < NEW
        assert late.tokens == plain(PROMPTS[0]).tokens[: len(late.tokens)]
        assert late.text == stack.tokenizer.decode(late.tokens)
    # The second batch of a call has only what the first left of the time.
    results = call(stack, PROMPTS[:2] * 3, "staged", max_time=3, batch_size=3)
    assert {r.finish_reason for r in results} == {"time"}
    assert sum(not r.tokens for r in results) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", PLANS)
def test_a_stream_adds_up_to_the_text(stack, plain, mode, kind, monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 3)
    for prompt in PROMPTS:
        expected = plain(prompt, **KINDS[kind])
        stream = ssd_jax.stream(
            stack,
            prompt,
            mode=mode,
            plan=PLANS[mode],
            max_new_tokens=NEW,
            logprobs=ALTERNATIVES,
            **KINDS[kind],
        )
        assert stream.result is None
        pieces = list(stream)
        assert len(pieces) > 2 and all(pieces)
        assert "".join(pieces) == stream.result.text == expected.text
        assert stream.result.tokens == expected.tokens
        assert stack.tokenizer.decode(expected.tokens) == expected.text


def test_a_closed_stream_leaves_nothing(stack, monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 3)
    options = dict(plan=STAGED, max_new_tokens=NEW, logprobs=ALTERNATIVES)
    alive = []

    class Watched(running.Batch):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(running, "Batch", Watched)
    with ssd_jax.stream(stack, PROMPTS[0], **options) as stream:
        assert next(stream) and alive[0]() is not None
    gc.collect()
    assert alive[0]() is None and stream.result is None and list(stream) == []
    with pytest.raises(PromptError, match="closed"):
        stream.follow()


def reference_log_probs(model, tokens) -> np.ndarray:
    """Log-softmax in float64 after each token of a text, in one plain pass."""
    logits = np.asarray(model(jnp.asarray([tokens], jnp.int32))[0][0], np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", PLANS)
def test_log_probabilities_are_the_oracles_own(stack, mode, kind):
    prompt = stack.tokenizer.encode(PROMPTS[2])
    result = call(stack, prompt, mode, **KINDS[kind])
    expected = reference_log_probs(stack.oracle, [*prompt, *result.tokens])[len(prompt) - 1 : -1]
    chosen = expected[np.arange(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, chosen, atol=2e-4)
    for top, row in zip(result.top_logprobs, expected, strict=True):
        assert list(top) == np.argsort(-row)[:ALTERNATIVES].tolist()
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:ALTERNATIVES], atol=2e-4)
    fewer = call(stack, [prompt, prompt, [1]], mode, **KINDS[kind] | dict(logprobs=[None, 1, 3]))
    assert fewer[0].logprobs is None and fewer[0].top_logprobs is None
    assert [list(top) for top in fewer[1].top_logprobs] == [
        list(top)[:1] for top in result.top_logprobs
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["baseline", "staged"])
def test_a_session_writes_what_a_fresh_call_writes(stack, plain, mode, kind):
    """Going on, going back, an edit in the middle, another text, the same again."""
    session = ssd_jax.Session(stack, mode=mode, plan=PLANS[mode])
    options = KINDS[kind] | dict(max_new_tokens=8, logprobs=ALTERNATIVES)
    text = stack.tokenizer.encode("def f(x):")
    prompts = [text]
    prompts.append([*text, *plain(text, **options).tokens, 40, 41])
    prompts.append(text[:-2])
    prompts.append([*prompts[1][:6], 50, *prompts[1][7:]])
    prompts.append([60, 61])
    prompts.append([60, 61])
    before, reused = [], []
    for prompt in prompts:
        result = session.generate(prompt, **options)
        fresh = plain(prompt, **options)
        assert (result.tokens, result.text) == (fresh.tokens, fresh.text)
        np.testing.assert_allclose(result.logprobs, fresh.logprobs, atol=2e-4)
        reused.append(result.stats.reused_tokens)
        # The newest token of either text is in no cache.
        assert reused[-1] == len(os.path.commonprefix([before[:-1], prompt[:-1]]))
        before = [*prompt, *result.tokens]
    assert reused[0] == 0 and reused[1] == len(text) + 7 and min(reused[2:4]) >= 3
    with pytest.raises(PromptError, match="larger max_tokens"):
        ssd_jax.Session(stack, max_tokens=10).generate([1, 2, 3], max_new_tokens=8)


def test_a_session_survives_a_stream_that_is_left(stack, plain, monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 3)
    session = ssd_jax.Session(stack, plan=STAGED)
    options = dict(max_new_tokens=NEW, logprobs=ALTERNATIVES)
    left = session.stream(PROMPTS[0], **options)
    assert next(left)
    again = session.generate(PROMPTS[0], **options)
    assert again.tokens == plain(PROMPTS[0]).tokens and again.stats.reused_tokens > 0
    assert list(left) == [] and left.result is None


@pytest.mark.parametrize(
    "prompt, options, error, message",
    [
        ([], dict(), PromptError, "empty"),
        ([[]], dict(), PromptError, "empty"),
        (np.zeros((0, 3), int), dict(), PromptError, "list of prompts is empty"),
        (["a", 5], dict(), PromptError, "text or token ids"),
        ([["a"]], dict(), PromptError, "integers"),
        (["a", [10**6]], dict(), PromptError, "outside the vocabulary"),
        (["a", "b"], dict(on_text=print), PromptError, "one text"),
        ("a", dict(num_return_sequences=2, on_text=print), PromptError, "one text"),
        ("a", dict(batch_size=0), SamplingError, "batch_size"),
        ("a", dict(eos_token_id=10**6), SamplingError, "outside the vocabulary"),
        ("a", dict(stop_token_sequences=[[1, 10**6]]), SamplingError, "outside the vocabulary"),
        ("a", dict(max_length=5), SamplingError, "'max_new_tokens'"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_runs(
    stack, monkeypatch, prompt, options, error, message
):
    monkeypatch.setattr(running, "Batch", None)
    with pytest.raises(error, match=message):
        ssd_jax.generate(stack, prompt, plan=STAGED, **options)


def test_stop_strings_need_a_tokenizer_and_streams_one_text(stack):
    with pytest.raises(SamplingError, match="need a tokenizer"):
        bare = dataclasses.replace(stack, tokenizer=None)
        ssd_jax.generate(bare, [1], stop_strings="x")
    with pytest.raises(SamplingError, match="one text"):
        ssd_jax.stream(stack, "a", num_return_sequences=2)
    with pytest.raises(SamplingError, match="max_tokens"):
        ssd_jax.Session(stack, max_tokens=65)
