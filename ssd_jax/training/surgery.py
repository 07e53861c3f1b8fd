"""Models made from other models: fewer layers or units, or the same function at a larger shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2, GPT2Config, abstract, unturned


def in_float32(model: GPT2) -> GPT2:
    """The same weights in a model that computes in float32."""
    return _model(model.config, _weights(model), np.float32)


def layers_of(model: GPT2, layers: int) -> GPT2:
    """A float32 model of ``layers`` evenly spaced layers of ``model``, first and last among them.

    The usual start of a distilled model (Sanh et al., 2019).

    Raises:
      ConfigError: ``model`` has fewer layers.
    """
    depth = model.config.n_layer
    if not 1 <= layers <= depth:
        raise ConfigError(f"cannot take {layers} of {depth} layers; ask for 1 to {depth}")
    chosen = np.linspace(0, depth - 1, layers).round().astype(int)
    weights = _weights(model)
    weights["h"] = {new: weights["h"][old] for new, old in enumerate(chosen.tolist())}
    return _model(dataclasses.replace(model.config, n_layer=layers), weights, np.float32)


def prune_hidden(model: GPT2, units: int) -> GPT2:
    """A float32 model whose MLPs have ``units`` hidden units, those that weigh most.

    A unit's weight is the product of the norms of what it reads by and of what it writes. Some
    training afterwards makes up for those that are gone.

    Raises:
      ConfigError: the model has fewer.
    """
    if not 1 <= units <= model.config.inner_dim:
        raise ConfigError(
            f"cannot keep {units} of {model.config.inner_dim} hidden units; ask for fewer"
        )
    weights = _weights(model)
    for block in weights["h"].values():
        read, write = block["mlp"]["c_fc"], block["mlp"]["c_proj"]
        size = np.linalg.norm(read["kernel"], axis=0) * np.linalg.norm(write["kernel"], axis=1)
        kept = np.sort(np.argsort(size)[len(size) - units :])
        block["mlp"] = {
            "c_fc": {"kernel": read["kernel"][:, kept], "bias": read["bias"][kept]},
            "c_proj": {"kernel": write["kernel"][kept], "bias": write["bias"]},
        }
    return _model(dataclasses.replace(model.config, n_inner=units), weights, np.float32)


def widen(model: GPT2, *, width: int, layers: int, dtype: Any = np.float32) -> GPT2:
    """A model of ``width`` channels and ``layers`` layers that computes what ``model`` does.

    Channels, heads and hidden units are repeated ``k = width / n_embd`` times, and what sums
    over them is divided by ``k`` (Chen et al., 2016, Net2Net). A layer norm of repeated
    channels is the repeated layer norm; the last one is divided by ``k`` too, since the logits
    sum over its channels. Further layers, copies of the last one, come last and write nothing
    to the residual stream: their output projections are zero.

    The function is the same up to rounding, and where ``k`` is a power of two no weight is
    rounded. Such a model costs what one of its size costs, and accepts what the small one does:
    it is for measuring speed, never quality. Whoever saves it must label it.

    Args:
      model: the model to widen.
      width: a multiple of its ``n_embd``.
      layers: at least its ``n_layer``.
      dtype: storage type of embeddings and kernels.

    Raises:
      ConfigError: ``width`` is no such multiple, or ``layers`` is too few.
    """
    config = model.config
    if width < config.n_embd or width % config.n_embd:
        raise ConfigError(
            f"width {width} is not a multiple of the model's {config.n_embd}; "
            f"take for instance {2 * config.n_embd}"
        )
    if layers < config.n_layer:
        raise ConfigError(
            f"{layers} layers are fewer than the model's {config.n_layer}; ask for more"
        )
    copies = width // config.n_embd
    wide = _weights(model)
    wide["wte"], wide["wpe"] = (_tile(wide[name], copies, 1) for name in ("wte", "wpe"))
    wide["ln_f"] = {name: _tile(leaf, copies, 0) / copies for name, leaf in wide["ln_f"].items()}
    if "lm_head" in wide:
        wide["lm_head"] = _tile(wide["lm_head"], copies, 1)
    blocks = [_widen_block(wide["h"][index], copies) for index in range(config.n_layer)]
    blocks += [_silent(blocks[-1])] * (layers - config.n_layer)
    wide["h"] = dict(enumerate(blocks))
    larger = dataclasses.replace(
        config,
        n_embd=width,
        n_layer=layers,
        n_head=config.n_head * copies,
        n_inner=None if config.n_inner is None else config.n_inner * copies,
    )
    return _model(larger, wide, dtype)


def _widen_block(block: dict, copies: int) -> dict:
    def linear(weights: dict, parts: int = 1) -> dict:
        kernel, bias = weights["kernel"], weights["bias"]
        kernel = _tile(kernel, copies, 0) / copies
        # c_attn's outputs are queries, keys and values side by side: each is repeated by itself.
        split = [np.split(x, parts, axis=-1) for x in (kernel, bias)]
        kernel, bias = (
            np.concatenate([_tile(part, copies, -1) for part in x], axis=-1) for x in split
        )
        return {"kernel": kernel, "bias": bias}

    return {
        **{
            norm: {name: _tile(leaf, copies, 0) for name, leaf in block[norm].items()}
            for norm in ("ln_1", "ln_2")
        },
        "attn": {
            "c_attn": linear(block["attn"]["c_attn"], parts=3),
            "c_proj": linear(block["attn"]["c_proj"]),
        },
        "mlp": {name: linear(block["mlp"][name]) for name in ("c_fc", "c_proj")},
    }


def _silent(block: dict) -> dict:
    """A block that adds zero to the residual stream."""

    def zero(weights: dict) -> dict:
        return jax.tree.map(np.zeros_like, weights)

    return block | {
        "attn": block["attn"] | {"c_proj": zero(block["attn"]["c_proj"])},
        "mlp": block["mlp"] | {"c_proj": zero(block["mlp"]["c_proj"])},
    }


def _tile(x: np.ndarray, copies: int, axis: int) -> np.ndarray:
    return np.concatenate([x] * copies, axis=axis)


def _weights(model: GPT2) -> dict[str, Any]:
    """The parameters as nested dictionaries of NumPy arrays.

    Raises:
      ConfigError: they are rounded to 8 bits, or of an exact model.
    """
    if model.exact or model.numerics == "int8":
        raise ConfigError("weights of 8 bits or of an exact model; start from the original")
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.from_flat_state(list(unturned(model)))))


def _model(config: GPT2Config, weights: dict[str, Any], dtype: Any) -> GPT2:
    """The model of these weights; layer norms and biases stay float32."""
    model = abstract(config, dtype=dtype, param_dtype=dtype)
    state = nnx.state(model, nnx.Param)
    shapes = nnx.to_pure_dict(state)
    weights = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), weights, shapes)
    nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, weights))
    nnx.update(model, state)
    return model
