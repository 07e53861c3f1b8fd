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
      keys: one ``[B, H, S, I]`` array per layer.
      values: one ``[B, H, S, I]`` array per layer.
      length: ``[B]`` int32, committed tokens held by this cache.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


def init(layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype) -> KVCache:
    """An empty cache of ``slots`` slots."""
    shape = (batch, heads, slots, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        length=jnp.zeros((batch,), jnp.int32),
    )


def write(buffer: jax.Array, rows: jax.Array, offset: jax.Array | int) -> jax.Array:
    """Write ``rows`` ``[B, H, T, I]`` into ``buffer`` ``[B, H, S, I]`` from slot ``offset`` on.

    ``offset`` is one slot for all rows, or ``[B]``, one for each.
    """
    rows = rows.astype(buffer.dtype)
    offset = jnp.asarray(offset, jnp.int32)
    if offset.ndim == 0:
        return lax.dynamic_update_slice_in_dim(buffer, rows, offset, axis=2)
    # One small in-place write a row.
    for b in range(buffer.shape[0]):
        buffer = lax.dynamic_update_slice(buffer, rows[b : b + 1], (b, 0, offset[b], 0))
    return buffer


def keep(cache: KVCache, slots: jax.Array, count: jax.Array) -> KVCache:
    """Commit accepted rows: move slots ``slots[b, :count[b]]`` to ``length[b]`` and on.

    Args:
      cache: the cache whose scratch slots hold the evaluated block.
      slots: ``[B, P]`` int32, the slot of each accepted token in order; entries from
        ``count`` on may be any slot in range (their rows land above the new length).
      count: ``[B]`` int32, how many to keep, ``0 <= count <= P``.
    """

    def move(buffer: jax.Array) -> jax.Array:
        index = slots[:, None, :, None]
        rows = jnp.take_along_axis(buffer, index, axis=2, mode="promise_in_bounds")
        # Gathered before anything is overwritten: fused into each row's write, the gather would
        # force a copy of the whole buffer.
        return write(buffer, lax.optimization_barrier(rows), cache.length)

    return KVCache(
        keys=tuple(move(k) for k in cache.keys),
        values=tuple(move(v) for v in cache.values),
        length=cache.length + count,
    )
