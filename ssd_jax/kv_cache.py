"""Static-shape key-value cache of one model.

Invariant: slots ``0 <= s < length[b]`` hold exactly the first ``length[b]`` committed tokens
of row ``b``, in order. Slots from ``length[b]`` on are scratch: a tree pass writes its block
there (at a fixed offset past the text, the same for all rows), attends to it under a tree
mask, and :func:`keep` then moves the accepted rows down to ``length``. Nothing is ever
erased; what lies above ``length`` is simply not attended to.

``dynamic_update_slice`` clamps an offset that is too large instead of failing, so the slots
must cover the text *and* every block written in one round; :class:`ssd_jax.plan.Capacities`
computes that number.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, kept as separate arrays (stacking them costs copies).

    Attributes:
      keys: one ``[B, H, S, I]`` array per layer, or ``[B, S, H, I]``.
      values: likewise.
      length: ``[B]`` int32, committed tokens held by this cache in their final slots.
      pending: ``[B, P]`` int32, scratch slots of the committed tokens that follow, in order, -1
        past the last of them; or ``None``. The next pass writes them to their final slots
        together with its own block, which saves two kernels a layer.
      slot_axis: 2, or 1 for slots before heads; static.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    pending: jax.Array | None = None
    slot_axis: int = dataclasses.field(default=2, metadata={"static": True})


@partial(
    jax.jit,
    static_argnames=("layers", "batch", "heads", "slots", "head_dim", "dtype", "slot_axis"),
)
def init(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype, slot_axis: int = 2
) -> KVCache:
    """An empty cache of ``slots`` slots, in one call: each of its arrays would take as long."""
    inner = (heads, slots) if slot_axis == 2 else (slots, heads)
    shape = (batch, *inner, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        length=jnp.zeros((batch,), jnp.int32),
        slot_axis=slot_axis,
    )


def write(
    buffer: jax.Array, rows: jax.Array, offset: jax.Array | int, slot_axis: int = 2
) -> jax.Array:
    """Write ``rows`` ``[B, H, T, I]`` into ``buffer`` ``[B, H, S, I]`` from slot ``offset`` on.

    ``offset`` is one slot for all rows, or ``[B]``, one for each. With ``slot_axis`` 1, ``T``
    and ``S`` stand before ``H``.
    """
    rows = rows.astype(buffer.dtype)
    offset = jnp.asarray(offset, jnp.int32)
    if offset.ndim == 0:
        return lax.dynamic_update_slice_in_dim(buffer, rows, offset, axis=slot_axis)
    # One small in-place write a row.
    for b in range(buffer.shape[0]):
        start = (b, 0, offset[b], 0) if slot_axis == 2 else (b, offset[b], 0, 0)
        buffer = lax.dynamic_update_slice(buffer, rows[b : b + 1], start)
    return buffer


def held(cache: KVCache) -> jax.Array:
    """``[B]`` int32, committed tokens in this cache, the pending ones among them."""
    if cache.pending is None:
        return cache.length
    return cache.length + jnp.sum(cache.pending >= 0, axis=1).astype(jnp.int32)


def take(cache: KVCache, slots: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values in ``slots`` ``[B, P]``, for each layer.

    Gathered before anything is overwritten: fused into each row's write, the gather would force
    a copy of the whole buffer.
    """
    axis = cache.slot_axis
    index = jnp.expand_dims(slots, (3 - axis, 3))
    rows = [
        jnp.take_along_axis(buffer, index, axis=axis, mode="promise_in_bounds")
        for buffer in (*cache.keys, *cache.values)
    ]
    rows = lax.optimization_barrier(rows)
    return list(zip(rows[: len(cache.keys)], rows[len(cache.keys) :], strict=True))


def keep(cache: KVCache, slots: jax.Array, count: jax.Array) -> KVCache:
    """Commit accepted rows: move slots ``slots[b, :count[b]]`` to ``length[b]`` and on.

    Args:
      cache: the cache whose scratch slots hold the evaluated block.
      slots: ``[B, P]`` int32, the slot of each accepted token in order; entries from
        ``count`` on may be any slot in range (their rows land above the new length).
      count: ``[B]`` int32, how many to keep, ``0 <= count <= P``.
    """

    keys, values = zip(*take(cache, slots), strict=True)

    def put(buffer: jax.Array, rows: jax.Array) -> jax.Array:
        return write(buffer, rows, cache.length, cache.slot_axis)

    return dataclasses.replace(
        cache,
        keys=tuple(map(put, cache.keys, keys)),
        values=tuple(map(put, cache.values, values)),
        length=cache.length + count,
    )


def settle(cache: KVCache) -> KVCache:
    """Move the pending rows, if any, and expect no more."""
    if cache.pending is None:
        return cache
    moved = keep(cache, jnp.maximum(cache.pending, 0), held(cache) - cache.length)
    return dataclasses.replace(moved, pending=None)
