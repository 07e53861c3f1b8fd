"""GPT-2 in Flax NNX: one forward pass for training, prefill and tree verification.

Modules and parameters carry the names of the Hugging Face implementation, so that
:mod:`ssd_jax.checkpoint` maps one onto the other by name alone. Kernels are ``[in, out]``, as
in Hugging Face's ``Conv1D``, or in a ``turned`` model ``[out, in]``, beside which a small one has
:class:`Tiles`.

Numerics: the residual stream, layer norms, biases, attention scores and softmax are float32.
Matrix products take operands of ``model.dtype`` and accumulate in float32; float32 operands
use the highest precision (no TF32). ``reorder_and_upcast_attn`` is therefore always in force.
Weights may be int8 instead (:mod:`ssd_jax.int8`); attention keeps to ``model.dtype`` then.

Exact models: XLA computes a sum in another order, and a product by other code, as the number of
rows of a pass changes, so that a token's logits differ in their last bits between a one-row pass
and a tree's. An ``exact`` model gives them alike to the bit: norms and attention are summed in
float64, and products are of the one form whose rows XLA's library computes independently of each
other (weights ``[out, in]`` on the right, two rows or more).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ssd_jax import int8, kv_cache
from ssd_jax.device import processor_has
from ssd_jax.errors import ConfigError
from ssd_jax.kv_cache import KVCache
from ssd_jax.spans import within

# A tile of a tensor core: fewer rows cost as much on a GPU, and in more kernels.
_FUSED_ROWS = 16
# One row alone is no matrix product to XLA on a CPU; tiles and exact models have so many at least.
_FEWEST_ROWS = 2
# Elsewhere an exact model's product has a multiple of so many rows, on which the library's choice
# of a kernel depends.
_EXACT_TILE = 32
# Outputs of a tile: as many as XLA's library computes side by side with AVX-512, so that it reads a
# tile where it lies. Other layouts it first rearranges, every time.
_TILE = 64
# Tiles are for up to so many rows.
_TILED_ROWS = 12
# Of models up to this width: beyond, the next five rows read a tile anew from memory.
_TILED_WIDTH = 512
# Up to so many rows weights stand on the left of their product on a CPU.
_FEW_ROWS = 128
# From so many rows on, as in a prefill, attention leaves out whatever part of a cache it can.
_MANY_ROWS = 32
# Into so many parts a product of one row is cut there, whichever first divides the outputs.
_PARTS = (8, 4, 2, *range(3, 64, 2))
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's ``GPT2Config`` that change the arithmetic.

    Raises:
      ConfigError: a size is not positive, heads do not divide the width, a rate lies outside
        ``[0, 1)``, or the activation is unknown.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if value is None and name == "n_inner":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"config field {name} must be a positive integer, not {value!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                "correct the config's n_head or n_embd"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation_function {self.activation_function!r}; "
                f"known: {', '.join(sorted(ACTIVATIONS))}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        if not self.layer_norm_epsilon > 0.0:
            raise ConfigError("layer_norm_epsilon must be positive")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def multiplied(self) -> int:
        """Weights that a pass multiplies by: what it costs, all but."""
        layer = 4 * self.n_embd**2 + 2 * self.n_embd * self.inner_dim
        return self.n_layer * layer + self.vocab_size * self.n_embd


def _product(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """``einsum`` with operands of ``dtype``, accumulated and returned in float32."""
    x, y = x.astype(dtype), y.astype(dtype)
    if dtype == jnp.float32:
        return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)
    return _narrow_product(spec, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``einsum`` of 16-bit operands in float32, in the backward pass too.

    Left to itself, the float32 cotangent would turn both backward products, two thirds of the
    work of training, into float32 ones.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _narrow_product_forward(spec, x, y):
    return _narrow_product(spec, x, y), (x, y)


def _narrow_product_backward(spec, operands, cotangent):
    left, right, out = spec.replace("->", ",").split(",")
    x, y = operands
    cotangent = cotangent.astype(x.dtype)
    grad_x = jnp.asarray(_narrow_product(f"{out},{right}->{left}", cotangent, y), x.dtype)
    grad_y = jnp.asarray(_narrow_product(f"{left},{out}->{right}", x, cotangent), y.dtype)
    return grad_x, grad_y


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


def _exact_product(x: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    """``[..., in]`` times ``[out, in]``, each row alike whatever the others are and how many."""
    count = math.prod(x.shape[:-1])
    on_cpu = jax.default_backend() == "cpu"
    filled = max(count, _FEWEST_ROWS) if on_cpu else _multiple(count, _EXACT_TILE)
    return _by_rows(x, filled, lambda rows: _product("ri,oi->ro", rows, weights, dtype))


def decodes_turned(dtype) -> bool:
    """Whether a model whose products are of ``dtype`` decodes faster here if it is turned."""
    return jnp.dtype(dtype) == jnp.float32 and jax.default_backend() == "cpu"


def prefers_tiles() -> bool:
    """Whether :class:`Tiles` are fast here: XLA's library for AVX2 computes fewer outputs side by
    side, reads tiles on one thread, and takes half as long again with them, for one row too."""
    return processor_has("avx512f")


class Tiles(nnx.Variable):
    """A second copy of weights, for passes of few rows: ``[G, in, 64]``, the outputs in groups of
    64, of which zeros fill up the last."""

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> Tiles:
        """Zeros."""
        return cls(jnp.zeros((_multiple(outputs, _TILE) // _TILE, inputs, _TILE), jnp.float32))

    @staticmethod
    def of(weights: np.ndarray) -> np.ndarray:
        """The tiles of ``[out, in]`` weights."""
        outputs, inputs = weights.shape
        filled = np.pad(weights, ((0, -outputs % _TILE), (0, 0)))
        return filled.reshape(-1, _TILE, inputs).swapaxes(1, 2)


def _tiled_product(x: jax.Array, tiles: jax.Array, outputs: int, dtype) -> jax.Array:
    """``[B, T, in]`` times tiles: on a CPU up to five rows take about the time of one.

    Rows come after tiles in the product's result: otherwise ``einsum`` swaps the operands, and XLA
    computes it in a loop of its own.
    """
    count = math.prod(x.shape[:-1])

    def product(rows: jax.Array) -> jax.Array:
        each = jnp.broadcast_to(rows, (len(tiles), *rows.shape))
        out = _product("gri,gio->gro", each, tiles, dtype)
        return out.swapaxes(0, 1).reshape(len(rows), -1)[:, :outputs]

    return _by_rows(x, max(count, _FEWEST_ROWS), product)


def _turned_product(x: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    """``[B, T, in]`` times ``[out, in]``, as fast as XLA can be made to on a CPU."""
    count = math.prod(x.shape[:-1])
    if not decodes_turned(dtype) or count > _FEW_ROWS:
        return _product("bti,oi->bto", x, weights, dtype)
    if count == 1:
        return _one_row_product(x, weights, dtype)

    def turned(rows: jax.Array) -> jax.Array:
        # Without a barrier XLA would turn the product round.
        return lax.optimization_barrier(_product("oi,ri->or", weights, rows, dtype)).T

    # With the weights on the left XLA's library does not rearrange them: half to four fifths of the
    # time for 4 to 16 rows.
    return _by_rows(x, count if count <= 4 else _multiple(count, 8), turned)


def _one_row_product(x: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    """:func:`_turned_product` of one row: XLA computes it on one thread, and parts of it side by
    side."""
    outputs, inputs = weights.shape
    parts = next((count for count in _PARTS if outputs % count == 0), 1)
    row = jnp.broadcast_to(x.reshape(inputs), (parts, inputs))
    out = _product("pi,poi->po", row, weights.reshape(parts, -1, inputs), dtype)
    return out.reshape(*x.shape[:-1], outputs)


def _times_stored(
    x: jax.Array,
    weights: nnx.Param,
    scale: nnx.Param | None,
    tiles: Tiles | None,
    *,
    dtype,
    exact: bool,
    eight: bool,
) -> jax.Array:
    """``[B, T, in]`` times a turned kernel or a table, ``[out, in]``, of whichever kind it is;
    ``eight`` for 8-bit activations."""
    if scale is not None:
        return int8.product(x, weights[...], scale[...], dtype=dtype, activations=eight)
    if exact:
        return _exact_product(x, weights[...], dtype)
    if tiles is not None and math.prod(x.shape[:-1]) <= _TILED_ROWS:
        return _tiled_product(x, tiles[...], len(weights[...]), dtype)
    return _turned_product(x, weights[...], dtype)


def _by_rows(x: jax.Array, filled: int, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A product ``[R, in]`` -> ``[R, out]`` of the rows of ``x`` ``[..., in]``, which zeros fill up
    to R = ``filled``."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    out = product(jnp.pad(rows, ((0, filled - count), (0, 0))))[:count]
    return out.reshape(*x.shape[:-1], -1)


def _multiple(count: int, tile: int) -> int:
    return -(-count // tile) * tile


class Linear(nnx.Module):
    """``x @ kernel + bias`` with an ``[in, out]`` kernel, or a ``turned`` one of ``[out, in]``."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        std: float,
        dtype,
        param_dtype,
        activations8: bool,
        exact: bool,
        turned: bool,
        tiled: bool,
        rngs: nnx.Rngs,
    ):
        shape = (n_out, n_in) if turned else (n_in, n_out)
        self.kernel = _weights(shape, std, param_dtype, rngs)
        self.kernel_scale = _scales(n_out, param_dtype)
        self.tiles = Tiles.empty(n_in, n_out) if tiled else None
        self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32))
        self.dtype = dtype
        self.activations8 = activations8
        self.exact = exact
        self.turned = turned

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.turned:
            out = _times_stored(
                x,
                self.kernel,
                self.kernel_scale,
                self.tiles,
                dtype=self.dtype,
                exact=self.exact,
                eight=self.activations8,
            )
        else:
            out = _product("bti,io->bto", x, self.kernel[...], self.dtype)
        return out + self.bias[...]


def _weights(shape: tuple[int, int], std: float, dtype, rngs: nnx.Rngs) -> nnx.Param:
    """Random; 8-bit ones, which are never trained, wait to be loaded."""
    key = rngs.params()
    if _is_8_bits(dtype):
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(nnx.initializers.normal(std)(key, shape, dtype))


def _scales(n_out: int, dtype) -> nnx.Param | None:
    """Of 8-bit weights, one for each output; ``None`` for others."""
    return nnx.Param(jnp.ones((n_out,), jnp.float32)) if _is_8_bits(dtype) else None


def _is_8_bits(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def _slot_axes(attention: str, turned: bool) -> tuple[int, int]:
    """Layout of a cache for some attention; ``turned`` for a CPU's."""
    if attention != "einsum":
        return kv_cache.FUSED
    return kv_cache.TURNED if turned else kv_cache.PLAIN


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, layer: int, attention: str, **kinds):
        width, std = config.n_embd, config.initializer_range
        self.c_attn = Linear(width, 3 * width, std=std, **kinds)
        self.c_proj = Linear(width, width, std=std / math.sqrt(2 * config.n_layer), **kinds)
        self.heads = config.n_head
        self.dtype = kinds["dtype"]
        self.attention = attention
        self.slot_axes = _slot_axes(attention, kinds["turned"] and decodes_turned(self.dtype))
        self.exact = kinds["exact"]
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.attn_dropout = nnx.Dropout(config.attn_pdrop)
        self.resid_dropout = nnx.Dropout(config.resid_pdrop)

    def __call__(self, x, mask, cached, offset, rngs):
        batch, rows, width = x.shape
        # [B, T, 3E] -> three [B, T, H, I]
        qkv = self.c_attn(x).reshape(batch, rows, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        fused = cached is not None and self.attention != "einsum"
        if fused:  # rows that only fill a tile have no keys
            key, value = key[:, : mask.shape[1]], value[:, : mask.shape[1]]
        else:
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
            key = key.mT if self.slot_axes == kv_cache.TURNED else key
        if cached is not None:
            of_keys, of_values = self.slot_axes
            keys, values, moved, end = cached
            if moved is not None:
                key = jnp.concatenate([moved[0], key.astype(self.dtype)], of_keys)
                value = jnp.concatenate([moved[1], value.astype(self.dtype)], of_values)
            key = kv_cache.write(keys, key, offset, of_keys)
            value = kv_cache.write(values, value, offset, of_values)
        if fused:
            mixed = self._attend_fused(query, key, value, mask)
        elif cached is not None:
            mixed = self._attend_within(end, query, key, value, mask)
        else:
            mixed = self._attend(query, key, value, mask, rngs)
        mixed = mixed.reshape(batch, rows, width)
        out = self.resid_dropout(self.c_proj(mixed), deterministic=rngs is None, rngs=rngs)
        return out, (key, value)

    def _attend(self, query, key, value, mask, rngs):
        """``[B, H, T, I]`` queries, keys as in the cache, ``[B, H, S, I]`` values ->
        ``[B, T, H, I]``."""
        if self.exact:
            return self._attend_exactly(query, key, value, mask)
        scores = _product(f"bhtd,{self._keys}->bhts", query * self.scale, key, self.dtype)
        least = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None], scores, least)
        largest = jnp.max(scores, axis=-1, keepdims=True, initial=least)  # there may be no slot
        weights = jnp.exp(scores - lax.stop_gradient(largest))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = self.attn_dropout(weights, deterministic=rngs is None, rngs=rngs)
        # Divided last, since there are fewer channels than slots.
        mixed = _product("bhts,bhsd->bhtd", weights, value, self.dtype) / total
        return mixed.swapaxes(1, 2)

    def _attend_exactly(self, query, key, value, mask):
        """:meth:`_attend` with sums and exponentials in float64: rounded to float32, they hardly
        ever tell in what order they were made, or by which of XLA's code for few or many rows."""
        # Rounded as they are in a cache.
        key, value = key.astype(self.dtype), value.astype(self.dtype)
        with jax.enable_x64(True):
            query, key, value = (x.astype(jnp.float64) for x in (query, key, value))
            scores = jnp.einsum(f"bhtd,{self._keys}->bhts", query, key).astype(jnp.float32)
            scores = scores * jnp.float32(self.scale)
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
            weights = scores - jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(weights.astype(jnp.float64))
            mixed = jnp.einsum("bhts,bhsd->bhtd", weights, value)
            mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
            return mixed.astype(jnp.float32).swapaxes(1, 2)

    @property
    def _keys(self) -> str:
        return "bhds" if self.slot_axes == kv_cache.TURNED else "bhsd"

    def _attend_within(self, end, query, key, value, mask):
        """:meth:`_attend` where nothing from slot ``end`` on is seen: a short text does not pay
        for a long cache."""

        def look(slots: int) -> jax.Array:
            first = (
                lax.slice_in_dim(x, 0, slots, axis=axis)
                for x, axis in zip((key, value, mask), (*self.slot_axes, 2), strict=True)
            )
            return self._attend(query, *first, rngs=None)

        # Read outside a branch, a cache that one row has been written to is copied on a CPU.
        rows = mask.shape[1]
        return within(end, mask.shape[2], look, branch=rows == 1, finely=rows >= _MANY_ROWS)

    def _attend_fused(self, query, key, value, mask):
        """``[B, T, H, I]`` queries, ``[B, S, H, I]`` keys and values -> ``[B, T, H, I]``."""
        spare = query.shape[1] - mask.shape[1]
        mask = jnp.pad(mask, ((0, 0), (0, spare), (0, 0)), constant_values=True)
        return jax.nn.dot_product_attention(
            query.astype(self.dtype),
            key,
            value,
            mask=mask[:, None],
            scale=self.scale,
            implementation="cudnn" if self.attention == "cudnn" else "xla",
        )


class MLP(nnx.Module):
    def __init__(self, config: GPT2Config, **kinds):
        width, inner, std = config.n_embd, config.inner_dim, config.initializer_range
        self.c_fc = Linear(width, inner, std=std, **kinds)
        self.c_proj = Linear(inner, width, std=std / math.sqrt(2 * config.n_layer), **kinds)
        self.activation = config.activation_function
        self.dropout = nnx.Dropout(config.resid_pdrop)

    def __call__(self, x, rngs):
        hidden = ACTIVATIONS[self.activation](self.c_fc(x))
        return self.dropout(self.c_proj(hidden), deterministic=rngs is None, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, layer: int, attention: str, **kinds):
        self.ln_1 = _layer_norm(config, kinds["exact"], kinds["rngs"])
        self.attn = Attention(config, layer, attention, **kinds)
        self.ln_2 = _layer_norm(config, kinds["exact"], kinds["rngs"])
        self.mlp = MLP(config, **kinds)

    def __call__(self, x, mask, cached, offset, rngs):
        mixed, cached = self.attn(self.ln_1(x), mask, cached, offset, rngs)
        x = x + mixed
        return x + self.mlp(self.ln_2(x), rngs), cached


class GPT2(nnx.Module):
    """A GPT-2 language model.

    Args:
      config: the architecture.
      dtype: operand type of every matrix product, and of the KV cache.
      param_dtype: storage type of embeddings and kernels; layer norms and biases stay float32.
        With int8, position embeddings are of type ``dtype``, and the 8-bit weights, which some
        processors want unsigned (:func:`ssd_jax.int8.prefers_unsigned`), wait to be loaded.
      activations8: with int8, whether the inputs of kernels and head are rounded to 8 bits as well
        (:mod:`ssd_jax.int8`); by default on a CPU.
      attention: of passes with a cache. ``einsum``, with heads before slots, is XLA's own;
        ``cudnn`` is one fused kernel (:func:`jax.nn.dot_product_attention`; 16-bit operands on an
        NVIDIA GPU only), with ``[B, S, H, I]`` caches; ``xla`` is the latter's arithmetic in that
        layout anywhere. By default what suits the backend.
      exact: logits depend on a token's own path alone, to the bit, see above. Always so with
        ``activations8``, and never with 8-bit weights otherwise.
      turned: kernels are ``[out, in]``, the faster layout to decode with in float32 on a CPU;
        always so if ``exact`` or of int8. A turned model in float32 of up to 512 channels has a
        second copy of kernels and head where that is faster still (:class:`Tiles`).
      rngs: initial weights are drawn from ``rngs.params``.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        activations8: bool | None = None,
        attention: str | None = None,
        exact: bool = False,
        turned: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        stored = jnp.dtype(param_dtype)
        if activations8 is None:
            activations8 = jax.default_backend() == "cpu"
        eight = _is_8_bits(stored)
        self.activations8 = activations8 and eight
        self.exact = self.activations8 or (exact and not eight)
        self.turned = turned or self.exact or eight
        if self.activations8 and config.n_embd >= int8.LEAST and int8.prefers_unsigned():
            stored = jnp.dtype(jnp.uint8)
        small = stored == jnp.float32 and config.n_embd <= _TILED_WIDTH
        self.tiled = turned and small and not self.exact and prefers_tiles()
        suitable = "einsum" if self.exact else _default_attention(config, self.dtype)
        self.attention = attention or suitable
        kinds: dict[str, Any] = dict(
            dtype=self.dtype,
            param_dtype=stored,
            activations8=self.activations8,
            exact=self.exact,
            turned=self.turned,
            tiled=self.tiled,
            rngs=rngs,
        )

        def table(rows: int, dtype) -> nnx.Param:
            return _weights((rows, config.n_embd), config.initializer_range, dtype, rngs)

        self.wte = table(config.vocab_size, stored)
        self.wte_scale = _scales(config.vocab_size, stored)
        self.wpe = table(config.n_positions, self.dtype if eight else stored)
        self.h = nnx.List(
            [Block(config, layer, self.attention, **kinds) for layer in range(config.n_layer)]
        )
        self.ln_f = _layer_norm(config, self.exact, rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else table(config.vocab_size, stored)
        self.lm_head_scale = None if tied else _scales(config.vocab_size, stored)
        self.head_tiles = Tiles.empty(config.n_embd, config.vocab_size) if self.tiled else None
        self.embd_dropout = nnx.Dropout(config.embd_pdrop)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        offset: jax.Array | int = 0,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """One pass over ``T`` tokens a row.

        Args:
          tokens: ``[B, T]`` int32 token ids.
          positions: ``[B, T]`` int32 position ids; ``0..T-1`` by default.
          mask: ``[B, T, S]`` bool, which slots each token attends to; causal by default
            (without a cache, where ``S = T``). Required with a cache.
          cache: if given, the block's keys and values are written to it from slot ``offset``
            on before attending, or, if it has pending rows, after ``P`` slots for these. Its
            ``length`` and ``pending`` are left alone: committing is the caller's.
          offset: first slot of the block: a scalar, or ``[B]``.
          rngs: given in training, turns dropout on (stream ``dropout``).

        Returns:
          Logits ``[B, T, V]`` float32 and the written cache (``None`` without one).
        """
        batch, rows = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(rows), (batch, rows))
        if mask is None:
            mask = jnp.broadcast_to(jnp.tri(rows, dtype=bool), (batch, rows, rows))
        if cache is not None and self.attention != "einsum":
            spare = max(_FUSED_ROWS - rows, 0)
            tokens = jnp.pad(tokens, ((0, 0), (0, spare)))
            positions = jnp.pad(positions, ((0, 0), (0, spare)))
        x = self._embed(tokens) + self.wpe[...][positions].astype(jnp.float32)
        x = self.embd_dropout(x, deterministic=rngs is None, rngs=rngs)
        layers, moved = [], [None] * len(self.h)
        slots = jnp.arange(1, mask.shape[2] + 1)
        end = jnp.max(jnp.where(jnp.any(mask, axis=(0, 1)), slots, 0))  # of what is seen at all
        if cache is not None and cache.pending is not None:
            moved = kv_cache.take(cache, jnp.maximum(cache.pending, 0))
        for index, block in enumerate(self.h):
            cached = None
            if cache is not None:
                cached = (cache.keys[index], cache.values[index], moved[index], end)
            with jax.named_scope(f"layer{index}"):
                x, cached = block(x, mask, cached, offset, rngs)
            layers.append(cached)
        logits = self._head(self.ln_f(x[:, :rows]))
        if cache is not None:
            keys, values = zip(*layers, strict=True)
            cache = dataclasses.replace(cache, keys=keys, values=values)
        return logits, cache

    @property
    def numerics(self) -> str:
        """``int8``, or the type of the weights' products."""
        return str(self.dtype) if self.wte_scale is None else "int8"

    @property
    def products(self) -> str:
        """The kind of its products, for :meth:`ssd_jax.plan.Plan.on_cpu`."""
        if self.numerics == "int8":
            return "int8"
        if self.tiled:
            return "tiled"
        return "wide" if self.config.n_embd > _TILED_WIDTH else "untiled"

    def _embed(self, tokens: jax.Array) -> jax.Array:
        rows = self.wte[...][tokens]
        if self.wte_scale is None:
            return rows.astype(jnp.float32)
        return int8.restored(rows, self.wte_scale[...][tokens])

    def _head(self, x: jax.Array) -> jax.Array:
        """``[B, T, E]`` -> logits ``[B, T, V]``."""
        head, scale = self.lm_head, self.lm_head_scale
        if head is None:
            head, scale = self.wte, self.wte_scale
        return _times_stored(
            x,
            head,
            scale,
            self.head_tiles,
            dtype=self.dtype,
            exact=self.exact,
            eight=self.activations8,
        )

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for this model."""
        c = self.config
        shape = c.n_layer, batch, c.n_head, slots, c.head_dim
        return kv_cache.init(*shape, self.dtype, self.h[0].attn.slot_axes)


def turned(params: Iterable[tuple[tuple, Any]]) -> Iterator[tuple[tuple, Any]]:
    """What a turned model has in place of another one's parameters, and the other way round: paths
    (as from ``nnx.to_flat_state``) and values, of which kernels are transposed."""
    for path, value in params:
        yield path, value.T if path[-1] == "kernel" else value


def tiled(params: Iterable[tuple[tuple, Any]], head: str) -> Iterator[tuple[tuple, Any]]:
    """What a tiled model has in place of a float model's parameters.

    Args:
      params: paths (as from ``nnx.to_flat_state``) and values.
      head: name of the table that is multiplied, ``wte`` or ``lm_head``.

    Yields:
      Paths and values, the tiles among them.
    """
    for path, value in turned(params):
        yield path, value
        *module, name = path
        if name == "kernel":
            yield (*module, "tiles"), Tiles.of(value)
        elif name == head:
            yield ("head_tiles",), Tiles.of(value)


def unturned(model: GPT2) -> Iterator[tuple[tuple, Any]]:
    """Paths (as from ``nnx.to_flat_state``) and values of a model's parameters as they are stored:
    kernels ``[in, out]``, or ``[out, in]`` ones of int8, signed."""
    params = ((path, param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    if model.numerics != "int8":
        return turned(params) if model.turned else params
    return ((path, int8.signed(x) if x.dtype == jnp.uint8 else x) for path, x in params)


def quantized(params: Iterable[tuple[tuple, Any]]) -> Iterator[tuple[tuple, Any]]:
    """What a model with int8 weights has in place of a float model's parameters.

    Args:
      params: paths (as from ``nnx.to_flat_state``) and values, lazily consumed.

    Yields:
      Paths and values, the scales among them.
    """
    for path, value in params:
        *module, name = path
        if name not in ("kernel", "wte", "lm_head"):
            yield path, value
            continue
        weights, scale = int8.quantize(value.T if name == "kernel" else value)
        yield path, weights
        yield (*module, f"{name}_scale"), scale


def _default_attention(config: GPT2Config, dtype) -> str:
    fits = dtype.itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 128
    return "cudnn" if fits and jax.default_backend() == "gpu" else "einsum"


class _ExactLayerNorm(nnx.LayerNorm):
    """Sums in float64: XLA sums the channels of few rows in another order than those of many."""

    def __call__(self, x, **unused):
        with jax.enable_x64(True):
            mean = jnp.mean(x.astype(jnp.float64), axis=-1, keepdims=True).astype(jnp.float32)
            squares = jnp.square(x - mean).astype(jnp.float64)
            variance = jnp.mean(squares, axis=-1, keepdims=True).astype(jnp.float32)
        assert self.scale is not None and self.bias is not None
        scale = lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return (x - mean) * scale + self.bias[...]


def _layer_norm(config: GPT2Config, exact: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    kind = _ExactLayerNorm if exact else nnx.LayerNorm
    return kind(
        config.n_embd,
        epsilon=config.layer_norm_epsilon,
        dtype=jnp.float32,
        use_fast_variance=False,
        rngs=rngs,
    )


def abstract(config: GPT2Config, **kinds) -> GPT2:
    """The model with shapes in place of arrays: nothing is allocated or computed."""
    return nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0), **kinds))


def parameter_count(model: GPT2) -> int:
    """Number of parameters (a tied head counts once)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
