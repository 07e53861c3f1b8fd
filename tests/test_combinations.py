"""Whatever options come together, speculation writes what plain decoding writes: alone, in a batch
and streamed."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from test_front import ALTERNATIVES, NEW, PLANS, stack  # noqa: F401

import ssd_jax

VOCAB = 270
TOKENS = st.integers(0, VOCAB - 1)
FEW = st.integers(100, 130)  # tokens that do occur
PROMPTS = st.one_of(
    st.sampled_from(["def f(x):", "é", "return x + 1\nreturn x", "\x00\t\n", "x" * 30]),
    st.lists(TOKENS, min_size=1, max_size=38),
)
SHARES = st.floats(0.05, 1.0)
OPTIONS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "eos_token_id": st.lists(TOKENS, min_size=2, max_size=2)},
    optional=dict(
        max_new_tokens=st.integers(1, NEW),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.integers(1, VOCAB + 9),
        top_p=SHARES,
        min_p=st.floats(0.0, 0.5),
        typical_p=SHARES,
        repetition_penalty=st.floats(0.5, 2.0),
        presence_penalty=st.floats(-2.0, 2.0),
        frequency_penalty=st.floats(-1.0, 1.0),
        logit_bias=st.dictionaries(TOKENS, st.floats(-9.0, 9.0), min_size=1, max_size=4),
        bad_words_ids=st.lists(st.lists(FEW, min_size=1, max_size=2), min_size=1, max_size=2),
        min_new_tokens=st.integers(0, 12),
        stop_strings=st.lists(st.sampled_from(["e", "\n", "re", "x +", "é"]), max_size=2),
        stop_token_sequences=st.lists(st.lists(FEW, min_size=1, max_size=2), max_size=2),
    ),
)


@pytest.mark.parametrize("mode", ["speculative", "staged"])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(PROMPTS, OPTIONS), min_size=3, max_size=3))
def test_any_options_together_write_what_plain_decoding_writes(stack, mode, requests):  # noqa: F811
    shared = dict(max_new_tokens=NEW, logprobs=ALTERNATIVES)
    configs = [ssd_jax.GenerationConfig(**shared | options) for _, options in requests]
    prompts = [prompt for prompt, _ in requests]
    plain = [
        ssd_jax.generate(stack, prompt, config, mode="baseline", plan=PLANS["baseline"])
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    together = ssd_jax.generate(stack, prompts, configs, plan=PLANS[mode], batch_size=3)
    with ssd_jax.stream(stack, prompts[0], configs[0], plan=PLANS[mode]) as pieces:
        assert "".join(pieces) == plain[0].text
    assert pieces.result is not None
    for expected, found in zip([*plain, plain[0]], [*together, pieces.result], strict=True):
        assert found.tokens == expected.tokens
        assert found.text == expected.text
        assert (found.finish_reason, found.stop_reason) == (
            expected.finish_reason,
            expected.stop_reason,
        )
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)
