"""Eight-bit weights: one byte a weight, one scale an output channel.

Weights are ``[out, in]``, whatever their layout in float, with symmetric scales: an output's
largest weight becomes 127. The model computed from them is another one than the original.

Two products with them:

* *8-bit activations* (the default on a CPU): each row of the input is scaled to 127 as well, so
  that the sum is of integers, exact in int32. Rounding amplifies: where the last bit of an input
  depends on how many rows a pass has, some activation is rounded the other way. So a model with
  8-bit activations sums layer norms and attention in float64, and its tree passes agree with its
  one-row passes nearly always to the bit.
* *Weights alone* (the default on a GPU, where a decode step waits for weights and not for
  arithmetic): converted to the input's type on their way, with the scale on the output.

The instructions that x86 has for sums of 8-bit products (VNNI) multiply unsigned by signed
numbers. Where a processor has them, a model with 8-bit activations therefore keeps its weights
:func:`unsigned`, with 128 for zero.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from ssd_jax.device import processor_has

_LARGEST = 127
# XLA's library takes no product all of whose sizes are smaller.
LEAST = 8
# What stands for zero in unsigned weights.
_ZERO = 128
# One row alone is no matrix product to XLA, and several times as slow on a CPU.
_FEWEST_ROWS = 2
# Up to here the weights had better stand on the left, where XLA's library does not rearrange them;
# its kernels for AVX2 are the faster ones on the left beyond the second number.
_FEW_ROWS, _FEW_ROWS_AVX2 = 8, 4


def quantize(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Int8 weights and their scales.

    Args:
      weights: ``[out, in]``, floats.

    Returns:
      ``[out, in]`` int8 and ``[out]`` float32; ``weights`` is about their product.
    """
    weights = np.asarray(weights, np.float32)
    scale = np.abs(weights).max(axis=1) / np.float32(_LARGEST)
    # A row of zeros has any scale.
    divisor = np.where(scale > 0, scale, 1.0)[:, None]
    return np.rint(weights / divisor).astype(np.int8), scale.astype(np.float32)


@functools.cache
def prefers_unsigned() -> bool:
    """Whether products with :func:`unsigned` weights are the fast ones here, and can be had."""
    if jax.default_backend() != "cpu" or not processor_has("avx512_vnni"):
        return False
    weights, rows = (
        jax.ShapeDtypeStruct((rows, 64), dtype) for rows, dtype in ((64, jnp.uint8), (2, jnp.int8))
    )
    try:
        _mixed_product.lower(weights, rows).compile()
    except jax.errors.JaxRuntimeError:  # as with flags that turn XLA's library off
        return False
    return True


def unsigned(weights):
    """Int8 weights as uint8 ones, which are greater by 128."""
    return weights.view(np.uint8) ^ np.uint8(_ZERO)


def signed(weights):
    """The int8 weights that uint8 ones stand for."""
    return (weights ^ np.uint8(_ZERO)).view(np.int8)


def restored(weights: jax.Array, scale: jax.Array) -> jax.Array:
    """Some outputs' weights ``[..., in]`` of either kind, with their scales ``[...]``, in
    float32."""
    values = weights.astype(jnp.float32)
    if weights.dtype == jnp.uint8:
        values = values - _ZERO
    return values * scale[..., None]


def product(
    x: jax.Array, weights: jax.Array, scale: jax.Array, *, dtype, activations: bool
) -> jax.Array:
    """``x`` times the weights, in float32.

    Args:
      x: ``[..., in]`` float32.
      weights: ``[out, in]`` int8, or with ``activations`` :func:`unsigned` ones.
      scale: ``[out]`` float32.
      dtype: type of the operands unless ``activations``.
      activations: whether ``x`` is rounded to 8 bits too.

    Returns:
      ``[..., out]`` float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if activations:
        sums = _integer_product(rows, weights)
    else:
        sums = jnp.einsum(
            "ri,oi->ro", rows.astype(dtype), weights.astype(dtype), **_accumulation(dtype)
        )
    return (sums * scale).reshape(*x.shape[:-1], -1)


def _integer_product(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """``[R, in]`` float32 times ``[out, in]`` 8-bit weights -> ``[R, out]`` float32, without the
    weights' scale."""
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / _LARGEST
    rounded = jnp.round(rows / scale).astype(jnp.int8)
    spare = max(_FEWEST_ROWS - rows.shape[0], 0)
    rounded = jnp.pad(rounded, ((0, spare), (0, 0)))
    if weights.dtype == jnp.uint8:
        surplus = _ZERO * jnp.sum(rounded, axis=-1, dtype=jnp.int32)
        sums = _mixed_product(weights, rounded).T - surplus[:, None]
    elif _weights_on_left(len(rounded)):
        sums = jnp.einsum("oi,ri->or", weights, rounded, preferred_element_type=jnp.int32)
        # Without a barrier XLA would turn the product round.
        sums = lax.optimization_barrier(sums).T
    else:
        sums = jnp.einsum("ri,oi->ro", rounded, weights, preferred_element_type=jnp.int32)
    return sums[: rows.shape[0]].astype(jnp.float32) * scale


def _weights_on_left(rows: int) -> bool:
    """Whether a product of signed numbers is computed as weights times rows."""
    return rows <= _FEW_ROWS if processor_has("avx512f") else rows > _FEW_ROWS_AVX2


# ``lax.dot_general`` converts operands of two types to int32 first, and XLA does not find its
# library's product in that.
_mixed_p = Primitive("mixed_product")


@jax.jit
def _mixed_product(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """``[out, in]`` uint8 times ``[R, in]`` int8 -> ``[out, R]`` int32."""
    # Without a barrier XLA would turn the product round, and there is none of int8 by uint8.
    return lax.optimization_barrier(_mixed_p.bind(weights, rows))


@_mixed_p.def_abstract_eval
def _mixed_shape(weights, rows):
    return ShapedArray((weights.shape[0], rows.shape[0]), jnp.int32)


def _lower_mixed(context, weights, rows):
    (out,) = context.avals_out
    shape = ir.RankedTensorType.get(out.shape, ir.IntegerType.get_signless(32))
    over_inputs = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[1],
        rhs_contracting_dimensions=[1],
    )
    return [stablehlo.dot_general(shape, weights, rows, over_inputs)]


mlir.register_lowering(_mixed_p, _lower_mixed, platform="cpu")


def _accumulation(dtype) -> dict:
    """Keywords of a product of this type that sums in float32."""
    if dtype == jnp.float32:
        return {"precision": lax.Precision.HIGHEST}
    return {"preferred_element_type": jnp.float32}
