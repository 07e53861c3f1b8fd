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
      length: ``[B]`` int32, committed tokens held by this cache.
      slot_axis: 2, or 1 for slots before heads; static.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    slot_axis: int = dataclasses.field(default=2, metadata={"static": True})


def init(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype, slot_axis: int = 2
) -> KVCache:
    """An empty cache of ``slots`` slots."""
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
        start = [b, 0, 0, 0]
        start[slot_axis] = offset[b]
        buffer = lax.dynamic_update_slice(buffer, rows[b : b + 1], start)
    return buffer


def keep(cache: KVCache, slots: jax.Array, count: jax.Array) -> KVCache:
    """Commit accepted rows: move slots ``slots[b, :count[b]]`` to ``length[b]`` and on.

    Args:
      cache: the cache whose scratch slots hold the evaluated block.
      slots: ``[B, P]`` int32, the slot of each accepted token in order; entries from
        ``count`` on may be any slot in range (their rows land above the new length).
      count: ``[B]`` int32, how many to keep, ``0 <= count <= P``.
    """

    axis = cache.slot_axis
    index = jnp.expand_dims(slots, (3 - axis, 3))

    def move(buffer: jax.Array) -> jax.Array:
        rows = jnp.take_along_axis(buffer, index, axis=axis, mode="promise_in_bounds")
        # Gathered before anything is overwritten: fused into each row's write, the gather would
        # force a copy of the whole buffer.
        return write(buffer, lax.optimization_barrier(rows), cache.length, axis)

    return dataclasses.replace(
        cache,
        keys=tuple(move(k) for k in cache.keys),
        values=tuple(move(v) for v in cache.values),
        length=cache.length + count,
    )
