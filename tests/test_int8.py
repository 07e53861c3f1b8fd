"""8-bit weights: the product against integers, the model against its own rounded weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from safetensors.numpy import load_file

import ssd_jax
from ssd_jax import checkpoint, gpt2, int8
from ssd_jax.errors import CheckpointError, ConfigError
from ssd_jax.generate import resolve_plan
from ssd_jax.gpt2 import GPT2, GPT2Config
from ssd_jax.stack import Stack
from ssd_jax.training import command, tokens
from ssd_jax.training.config import TokenizerConfig
from ssd_jax.training.surgery import widen


def filled(model: GPT2, values: dict) -> GPT2:
    """An abstract model with these weights, by path."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    state = [(path, param.replace(values[path].astype(param.dtype))) for path, param in params]
    nnx.update(model, nnx.from_flat_state(state))
    return model


def dequantized(model: GPT2) -> GPT2:
    """The float model whose weights are exactly those that the int8 model stands for."""
    params = dict(gpt2.unturned(model))
    for path, value in params.items():
        if (scale := params.get((*path[:-1], f"{path[-1]}_scale"))) is not None:
            value = value.astype(jnp.float32) * scale[:, None]
            params[path] = value.T if path[-1] == "kernel" else value
    return filled(gpt2.abstract(model.config), params)


def weights(model: GPT2) -> dict:
    return {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture(scope="module", params=["tied", "untied"])
def original(request) -> GPT2:
    return toys.model(width=64, tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def rounded(original) -> GPT2:
    return checkpoint.quantize(original)


def test_a_weight_is_off_by_half_a_step_at_most():
    values = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    values[3] = 0
    stored, scale = int8.quantize(values)
    assert stored.dtype == np.int8 and np.abs(stored).max() == 127 and scale[3] == 0
    off = np.abs(stored * scale[:, None] - values)
    assert (off <= scale[:, None] * 0.5001).all() and off.max() > 0
    assert (np.abs(stored).max(axis=1) == 127)[scale > 0].all()


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 9, 20, 32, 130])
def test_the_product_is_that_of_the_rounded_numbers(rows, avx512, monkeypatch):
    # Of the other instructions the truth, as whether weights are unsigned is asked once and kept.
    has = int8.processor_has
    monkeypatch.setattr(int8, "processor_has", lambda x: avx512 if x == "avx512f" else has(x))
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(1, rows, 96)) * 3).astype(np.float32)
    stored, scale = int8.quantize(rng.normal(size=(40, 96)))
    got = int8.product(jnp.array(x), stored, scale, dtype=jnp.float32, activations=True)
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    sums = np.round(x / step).astype(np.int64) @ stored.T.astype(np.int64)
    np.testing.assert_allclose(got, sums * step * scale, rtol=1e-6)
    if int8.prefers_unsigned():
        weights = jnp.array(int8.unsigned(stored))
        same = int8.product(jnp.array(x), weights, scale, dtype=jnp.float32, activations=True)
        np.testing.assert_array_equal(same, got)
    plain = int8.product(jnp.array(x), stored, scale, dtype=jnp.float32, activations=False)
    np.testing.assert_allclose(plain, x @ (stored.T * scale), rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_gives_zeros():
    stored, scale = int8.quantize(np.ones((4, 6)))
    zero = jnp.zeros((1, 3, 6))
    assert not int8.product(zero, stored, scale, dtype=jnp.float32, activations=True).any()


def test_the_model_computes_with_its_rounded_weights(original, rounded):
    tokens = np.arange(40)[None] * 7 % toys.VOCAB
    alone = gpt2.abstract(original.config, param_dtype=jnp.int8, activations8=False)
    filled(alone, dict(gpt2.unturned(rounded)))
    expected = dequantized(rounded)(tokens)[0]
    np.testing.assert_allclose(alone(tokens)[0], expected, rtol=1e-4, atol=1e-4)
    # 8-bit activations cost something, but far less than the logits' spread.
    off = np.abs(rounded(tokens)[0] - expected)
    assert 0 < off.mean() < 0.05 * np.std(expected)
    assert rounded.numerics == "int8" and rounded.dtype == jnp.float32


@pytest.mark.parametrize("extreme", [-128, -1, 127])
def test_unsigned_weights_lose_nothing_at_the_ends_of_their_range(extreme):
    weights = np.full((64, 4000), extreme, np.int8)
    np.testing.assert_array_equal(int8.signed(int8.unsigned(weights)), weights)
    assert (int8.unsigned(weights).astype(int) == extreme + 128).all()
    scale = np.ones(64, np.float32)
    stored = int8.unsigned(weights) if int8.prefers_unsigned() else weights
    x = jnp.ones((1, 5, 4000)).at[0, 3].set(-1.0)
    got = int8.product(x, jnp.array(stored), scale, dtype=jnp.float32, activations=True)
    expected = 4000.0 * extreme * np.where(np.arange(5) == 3, -1, 1)[None, :, None]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-6)


def test_a_processor_without_the_instructions_gets_the_same_logits(rounded, original, monkeypatch):
    tokens = np.arange(40)[None] * 7 % toys.VOCAB
    monkeypatch.setattr(int8, "prefers_unsigned", lambda: False)
    signed = checkpoint.quantize(original)
    assert signed.wte[...].dtype == jnp.int8
    np.testing.assert_array_equal(signed(tokens)[0], rounded(tokens)[0])


def test_unsigned_weights_are_for_processors_and_programs_that_have_the_product(monkeypatch):
    class Refused:
        @staticmethod
        def lower(*_):
            raise jax.errors.JaxRuntimeError("no such product")

    asked = int8.prefers_unsigned.__wrapped__
    monkeypatch.setattr(int8, "processor_has", lambda _: True)
    monkeypatch.setattr(int8, "_mixed_product", Refused)
    assert asked() is False
    monkeypatch.undo()
    monkeypatch.setattr(int8, "processor_has", lambda _: False)
    assert asked() is False
    monkeypatch.setattr(int8, "prefers_unsigned", lambda: True)
    for width, stored in ((4, jnp.int8), (8, jnp.uint8)):
        config = GPT2Config(n_embd=width, n_head=2)
        model = gpt2.abstract(config, param_dtype=jnp.int8, activations8=True)
        assert model.wte.dtype == model.h[0].attn.c_proj.kernel.dtype == stored


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 3}])
def test_speculation_writes_what_the_8_bit_oracle_writes(options):
    floats = toys.stack("between")
    stack = dataclasses.replace(floats, oracle=checkpoint.quantize(floats.oracle))
    for prompt in ([1, 2, 3], [7] * 9):
        texts = [
            ssd_jax.generate(stack, prompt, mode=mode, max_new_tokens=40, **options)
            for mode in ("baseline", "speculative", "staged")
        ]
        assert texts[0].tokens == texts[1].tokens == texts[2].tokens
        assert texts[2].stats.rounds < 40


def test_its_default_plan_is_narrower_than_the_same_oracles_in_float32(original):
    stack = Stack(checkpoint.quantize(original), (toys.model(width=4, layers=1),))
    floats = dataclasses.replace(stack, oracle=original)
    plans = [resolve_plan(s, "staged", "default", sampled=False)[0] for s in (stack, floats)]
    assert [plan.width for plan in plans] == [8, 16]
    assert plans[0].drafts[0].cost > plans[1].drafts[0].cost > 0


def test_saved_and_loaded_it_is_the_same(original, rounded, tmp_path):
    checkpoint.save_model(rounded, tmp_path / "int8", label="rounded")
    checkpoint.save_model(original, tmp_path / "float")
    loaded = {
        "stored": checkpoint.load_model(tmp_path / "int8"),
        "as int8": checkpoint.load_model(tmp_path / "int8", dtype="int8"),
        "on loading": checkpoint.load_model(tmp_path / "float", dtype="int8"),
    }
    for model in loaded.values():
        assert model.numerics == "int8"
        assert weights(model).keys() == weights(rounded).keys()
        for path, value in weights(rounded).items():
            np.testing.assert_array_equal(weights(model)[path], value)
    assert checkpoint.load_label(tmp_path / "int8") == "rounded"
    # Whatever the processor, the file holds signed weights.
    stored = load_file(tmp_path / "int8" / "model.safetensors")["transformer.wte.weight"]
    np.testing.assert_array_equal(stored, int8.quantize(np.asarray(original.wte[...]))[0])
    small, large = (
        sum(p.stat().st_size for p in (tmp_path / n).glob("*.safetensors"))
        for n in ("int8", "float")
    )
    assert small < 0.45 * large


def test_only_the_oracle_of_a_stack_is_rounded(original, tmp_path):
    for name in ("oracle", "draft"):
        checkpoint.save_model(original, tmp_path / name)
    stack = ssd_jax.load(tmp_path, dtype="int8")
    assert [model.numerics for model in (stack.oracle, *stack.drafts)] == ["int8", "float32"]
    assert stack.digest != ssd_jax.load(tmp_path).digest


def test_what_8_bits_cannot_do_is_said(original, rounded, tmp_path):
    with pytest.raises(ConfigError, match="leave dtype out"):
        checkpoint.save_model(rounded, tmp_path, dtype="float32")
    with pytest.raises(ConfigError, match="start from the original"):
        widen(rounded, width=128, layers=2)
    checkpoint.save_model(original, tmp_path / "mixed")
    config = tmp_path / "mixed" / "config.json"
    method = '{"quantization_config": {"quant_method": "ssd_jax_int8"},'
    config.write_text(config.read_text().replace("{", method, 1))
    with pytest.raises(CheckpointError, match="missing tensor"):
        checkpoint.load_model(tmp_path / "mixed")
    config.write_text(config.read_text().replace("ssd_jax_int8", "gptq"))
    with pytest.raises(ConfigError, match="quantization_config"):
        checkpoint.load_model(tmp_path / "mixed")


def test_the_command_prints_the_loss_and_saves(tmp_path, capsys):
    text = "the cat sat on the mat\n" * 80
    tokenizer = tokens.train_tokenizer([text], TokenizerConfig(vocab_size=265))
    model = toys.model(width=32, vocab_size=tokenizer.vocab_size, eos_token_id=0)
    checkpoint.save_model(model, tmp_path / "float")
    tokenizer.save(tmp_path / "float")
    (tmp_path / "held.txt").write_text(text)
    out = tmp_path / "int8"
    argv = ["quantize", "--model", str(tmp_path / "float"), "--out", str(out), "--text"]
    assert command.main([*argv, str(tmp_path / "held.txt")]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "a pass reads" in printed
    assert "bits per byte" in (checkpoint.load_label(out) or "")
    assert checkpoint.load_model(out).numerics == "int8"
    assert command.main([*argv, str(tmp_path / "absent")]) == 2
    assert "absent: unreadable" in capsys.readouterr().err
