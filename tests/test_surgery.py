"""Models made from other models: the same function at a larger shape, fewer layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

from ssd_jax import checkpoint, gpt2
from ssd_jax.errors import ConfigError
from ssd_jax.generate import generate
from ssd_jax.gpt2 import GPT2Config
from ssd_jax.plan import Plan
from ssd_jax.stack import Stack
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import command, tokens
from ssd_jax.training.config import TokenizerConfig
from ssd_jax.training.surgery import layers_of, prune_hidden, widen


def _logits(model) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, toys.VOCAB, (2, 20)).astype(np.int32)
    return np.asarray(jax.jit(lambda model, ids: model(ids)[0])(model, ids))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 24},
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        {"scale_attn_weights": False, "n_head": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("copies", "layers"), [(1, 3), (2, 2), (3, 4), (4, 5)])
def test_a_widened_model_has_the_same_logits(fields, copies, layers):
    small = toys.model(3, width=16, **fields)
    # Random layer norms and biases: at their initial 1 and 0 a mistake would not show.
    state = nnx.state(small, nnx.Param)
    key = jax.random.key(1)
    nnx.update(small, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), state))
    wide = widen(small, width=16 * copies, layers=layers)
    assert wide.config.n_embd == 16 * copies and wide.config.n_layer == layers
    assert wide.config.head_dim == small.config.head_dim
    np.testing.assert_allclose(_logits(wide), _logits(small), rtol=1e-4, atol=1e-4)


def test_pruning_keeps_the_units_that_weigh_most():
    model = toys.model(2, width=16)
    # Units that write nothing can go without a trace.
    useless = np.random.default_rng(0).permutation(64)[:24]
    for block in model.h:
        kernel = block.mlp.c_proj.kernel
        kernel[...] = kernel[...].at[useless].set(0.0)
    pruned = prune_hidden(model, 40)
    assert pruned.config.inner_dim == 40 and model.config.inner_dim == 64
    np.testing.assert_allclose(_logits(pruned), _logits(model), rtol=1e-5, atol=1e-5)
    assert not np.allclose(_logits(prune_hidden(model, 20)), _logits(model), atol=1e-4)
    for units in (0, 65):
        with pytest.raises(ConfigError, match="hidden units"):
            prune_hidden(model, units)


def test_a_widened_oracle_writes_and_accepts_the_same():
    small = toys.stack("between", drafts=1)
    wide = Stack(widen(small.oracle, width=64, layers=4), small.drafts, small.ngram)
    # The default plan would look at the ratio of sizes.
    for plan in (Plan.baseline(), Plan.staged()):
        a, b = (generate(s, [1, 2, 3], max_new_tokens=30, plan=plan) for s in (small, wide))
        assert a.tokens == b.tokens
        assert a.stats.passes == b.stats.passes


def test_gpt2_large_is_within_reach():
    small = gpt2.abstract(GPT2Config(n_embd=320, n_layer=8, n_head=5, vocab_size=8192))
    large = GPT2Config(n_embd=1280, n_layer=36, n_head=20, vocab_size=8192)
    assert 1280 % small.config.n_embd == 0 and small.config.head_dim == large.head_dim


@pytest.mark.parametrize(
    ("width", "layers", "says"),
    [(48, 2, "not a multiple"), (16, 2, "not a multiple"), (64, 1, "fewer than")],
)
def test_other_shapes_are_refused(width, layers, says):
    with pytest.raises(ConfigError, match=says):
        widen(toys.model(), width=width, layers=layers)


def test_evenly_spaced_layers_are_taken_with_the_embeddings():
    model = toys.model(layers=5)
    small = layers_of(model, 3)
    for new, old in enumerate((0, 2, 4)):
        blocks = (jax.tree.leaves(nnx.state(m)) for m in (small.h[new], model.h[old]))
        for a, b in zip(*blocks, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(small.wte[...], model.wte[...])
    np.testing.assert_array_equal(_logits(layers_of(model, 5)), _logits(model))
    with pytest.raises(ConfigError, match="6 of 5"):
        layers_of(model, 6)


def test_the_command_saves_a_labelled_model(tmp_path, capsys):
    small, wide = tmp_path / "small", tmp_path / "wide"
    tokenizer = tokens.train_tokenizer(["abc abd " * 9], TokenizerConfig(vocab_size=260))
    model = toys.model(width=16, vocab_size=tokenizer.vocab_size)
    checkpoint.save_model(model, small)
    tokenizer.save(small)
    argv = ["widen", "--model", str(small), "--out", str(wide), "--dtype", "float32"]
    assert command.main([*argv, "--width", "64", "--layers", "3"]) == 0
    assert "widened from 2 x 16 to 3 x 64" in capsys.readouterr().out
    assert "widened from 2 x 16 to 3 x 64" in (checkpoint.load_label(wide) or "")
    assert checkpoint.load_label(small) is None
    loaded = checkpoint.load_model(wide)
    np.testing.assert_allclose(_logits(loaded), _logits(model), rtol=1e-4, atol=1e-4)
    assert Tokenizer.load(wide).vocab_size == 260
    assert json.loads((wide / "config.json").read_text())["n_embd"] == 64
    assert command.main([*argv, "--width", "50", "--layers", "3"]) == 2
    assert "not a multiple" in capsys.readouterr().err


def test_widening_in_bfloat16_rounds_no_weight():
    model = toys.model(width=16)
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(model))
    nnx.update(model, bf16)
    narrow = widen(model, width=64, layers=2, dtype=jnp.bfloat16)
    exact = widen(model, width=64, layers=2)
    leaves = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (narrow, exact))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), b)
