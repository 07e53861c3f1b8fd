"""Exact models: what a token's logits are does not depend on the other rows of a pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

import ssd_jax
from ssd_jax import checkpoint, gpt2
from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2

LENGTH, SLOTS = 40, 64

as_users_compile = pytest.mark.skipif(
    jax.config.read("jax_disable_most_optimizations"),
    reason="about the code that users run; .ci/run compiles it so",
)


@pytest.fixture(scope="module")
def original():
    return toys.model(width=192)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def exact(original, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    checkpoint.save_model(original, folder)
    return checkpoint.load_model(folder, dtype=request.param, exact=True)


@jax.jit
def step(model, tokens, first, cache):
    positions = first + jnp.arange(tokens.shape[1])
    mask = jnp.arange(SLOTS) <= positions[None, :, None]
    return model(tokens, positions[None], mask=mask, cache=cache, offset=first)


def in_passes(model: GPT2, tokens: np.ndarray, rows: int) -> np.ndarray:
    cache, logits = model.init_cache(1, SLOTS), []
    for first in range(0, tokens.shape[1], rows):
        some, cache = step(model, tokens[:, first : first + rows], first, cache)
        logits.append(some)
    return np.concatenate(logits, axis=1)


@as_users_compile
def test_a_pass_of_one_row_equals_one_of_many_to_the_bit(exact):
    tokens = np.arange(LENGTH)[None] * 11 % toys.VOCAB
    whole = np.asarray(jax.jit(lambda model: model(tokens)[0])(exact))
    for rows in (1, 5, 20):
        np.testing.assert_array_equal(in_passes(exact, tokens, rows), whole)


@as_users_compile
def test_rows_of_a_batch_are_those_of_each_alone_to_the_bit(exact):
    tokens = np.arange(3 * LENGTH).reshape(3, LENGTH) * 7 % toys.VOCAB
    together = np.asarray(jax.jit(lambda model: model(tokens)[0])(exact))
    for row in range(3):
        alone = jax.jit(lambda model, row=row: model(tokens[row : row + 1])[0])(exact)
        np.testing.assert_array_equal(together[row], np.asarray(alone)[0])


@as_users_compile
def test_other_models_tell_how_many_rows_a_pass_had(original):
    """What exact models are for; without it the tests above would prove nothing."""
    tokens = np.arange(LENGTH)[None] * 11 % toys.VOCAB
    whole = np.asarray(jax.jit(lambda model: model(tokens)[0])(original))
    assert not np.array_equal(in_passes(original, tokens, 1), whole)


def test_an_exact_model_is_the_same_function(original, exact):
    tokens = np.arange(LENGTH)[None] * 11 % toys.VOCAB
    expected = original(tokens)[0]
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.3}[exact.numerics]
    off = np.abs(exact(tokens)[0] - expected) / np.std(expected)
    assert off.mean() < tolerance
    assert exact.exact and not original.exact


def test_saved_it_is_the_original(original, tmp_path):
    model = gpt2.abstract(original.config, exact=True)
    params = nnx.to_flat_state(nnx.state(original, nnx.Param))
    values = dict(gpt2.turned((keys, param[...]) for keys, param in params))
    kinds = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    state = [(keys, kinds[keys].replace(value)) for keys, value in values.items()]
    nnx.update(model, nnx.from_flat_state(state))
    checkpoint.save_model(model, tmp_path)
    again = checkpoint.load_model(tmp_path)
    for (_, a), (_, b) in zip(nnx.to_flat_state(nnx.state(again, nnx.Param)), params, strict=True):
        np.testing.assert_array_equal(a[...], b[...])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 3}])
def test_speculation_writes_what_the_exact_oracle_writes(tmp_path, options):
    stack = toys.stack("between")
    checkpoint.save_model(stack.oracle, tmp_path / "oracle")
    oracle = checkpoint.load_model(tmp_path / "oracle", exact=True)
    stack = dataclasses.replace(stack, oracle=oracle)
    for prompt in ([1, 2, 3], [7] * 9):
        texts = [
            ssd_jax.generate(stack, prompt, mode=mode, max_new_tokens=40, **options)
            for mode in ("baseline", "speculative", "staged")
        ]
        assert texts[0].tokens == texts[1].tokens == texts[2].tokens
        assert texts[2].stats.rounds < 40


def test_only_the_oracle_of_a_stack_is_exact(original, tmp_path):
    for name in ("oracle", "draft"):
        checkpoint.save_model(original, tmp_path / name)
    stack = ssd_jax.load(tmp_path, exact=True)
    assert [model.exact for model in (stack.oracle, *stack.drafts)] == [True, False]
    assert stack.digest != ssd_jax.load(tmp_path).digest
    with pytest.raises(ConfigError, match="exact=True"):
        ssd_jax.load(oracle=original, exact=True)
    with pytest.raises(ConfigError, match="without exact"):
        checkpoint.quantize(stack.oracle)
