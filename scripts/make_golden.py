"""Write ``tests/golden``: tiny GPT-2 models and the logits ``transformers`` gives for them.

Needs torch and transformers (the ``peers`` extra). The tests read what it writes without
either. Usage: ``python scripts/make_golden.py [FOLDER]``.

Weights are drawn wide, biases and layer norms included, so that a mistake anywhere moves the
logits; and are rounded to float16, which halves the files and is exact in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import serialization, traverse_util
from safetensors.numpy import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

COMMON: dict[str, Any] = dict(vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2)

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact_gelu_inner": dict(activation_function="gelu", n_inner=24, n_head=4),
    "relu_unscaled": dict(activation_function="relu", scale_attn_weights=False),
    "silu_by_layer": dict(
        activation_function="silu", scale_attn_by_inverse_layer_idx=True, n_layer=3
    ),
    "tanh_epsilon": dict(activation_function="tanh", layer_norm_epsilon=0.1),
    "quick_gelu_upcast": dict(
        activation_function="quick_gelu",
        reorder_and_upcast_attn=True,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "untied": dict(tie_word_embeddings=False, vocab_size=67, n_head=1),
}

ACTIVATIONS = [
    *("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu", "quick_gelu"),
    *("relu", "relu2", "relu6", "leaky_relu", "silu", "swish", "mish"),
    *("tanh", "sigmoid", "linear"),
]


def make_model(seed: int, **fields) -> GPT2LMHeadModel:
    """A model whose every parameter is random, with float16 values in float32."""
    config = GPT2Config(**(COMMON | fields), bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"  # the one that honours reorder_and_upcast_attn
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            center = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            noise = 0.35 * torch.randn(value.shape, generator=generator)
            value.copy_((center + noise).half())
    return model


def save_expected(model: GPT2LMHeadModel, path: Path):
    """Two rows of 16 tokens and their logits."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, model.config.vocab_size, (2, 16), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    save_file({"tokens": tokens, "logits": np.ascontiguousarray(logits)}, path)


def save_legacy_bin(model: GPT2LMHeadModel, path: Path):
    """A file as early versions wrote it: no ``transformer.`` prefix, masks among the weights."""
    state = {k.removeprefix("transformer."): v.half() for k, v in model.state_dict().items()}
    del state["lm_head.weight"]
    slots = model.config.n_positions
    for layer in range(model.config.n_layer):
        mask = torch.ones(1, 1, slots, slots, dtype=torch.uint8).tril()
        state[f"h.{layer}.attn.bias"] = mask
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, path)


def save_flax(model: GPT2LMHeadModel, path: Path):
    """The Flax layout: ``FlaxConv1D`` keeps ``[out, in]`` kernels, the transpose of Conv1D's."""
    flat = {}
    for name, value in model.state_dict().items():
        *module, leaf = name.split(".")
        value = value.half().numpy()
        if name == "lm_head.weight":
            continue
        if leaf == "weight":
            is_norm, is_table = module[-1].startswith("ln_"), module[-1] in ("wte", "wpe")
            leaf = "scale" if is_norm else "embedding" if is_table else "kernel"
        flat[(*module, leaf)] = np.ascontiguousarray(value.T if leaf == "kernel" else value)
    path.write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(flat)))


def save_activations(path: Path):
    inputs = torch.linspace(-8.0, 8.0, 161)
    outputs = {name: ACT2FN[name](inputs).numpy().copy() for name in ACTIVATIONS}
    save_file({"inputs": inputs.numpy(), **outputs}, path)


def config_folder(model: GPT2LMHeadModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description="Write the golden files of tests/.")
    default = Path(__file__).resolve().parent.parent / "tests" / "golden"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    save_activations(folder / "activations.safetensors")
    for seed, (name, fields) in enumerate(MODELS.items()):
        model = make_model(seed, **fields)
        target = folder / f"gpt2_{name}"
        target.mkdir(exist_ok=True)
        save_expected(model, target / "expected.safetensors")
        if name == "plain":
            save_legacy_bin(model, config_folder(model, folder / "gpt2_bin") / "pytorch_model.bin")
            save_flax(model, config_folder(model, folder / "gpt2_flax") / "flax_model.msgpack")
        model.half().save_pretrained(target)
        (target / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
