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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Where slots stand in keys, and where in values.
PLAIN = (2, 2)
# As a CPU reads them where they lie when rows are few: what a product sums over, channels with keys
# and slots with values, stands next to last.
TURNED = (3, 2)
# One fused kernel wants slots before heads.
FUSED = (1, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, kept as separate arrays (stacking them costs copies).

    Attributes:
      keys: one ``[B, H, S, I]`` array per layer, with S in another place if ``slot_axes`` says so.
      values: likewise.
      length: ``[B]`` int32, committed tokens held by this cache in their final slots.
      pending: ``[B, P]`` int32, scratch slots of the committed tokens that follow, in order, -1
        past the last of them; or ``None``. The next pass writes them to their final slots
        together with its own block, which saves two kernels a layer.
      slot_axes: the place of S in keys and in values: ``PLAIN``, ``TURNED`` or ``FUSED``; static.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    pending: jax.Array | None = None
    slot_axes: tuple[int, int] = dataclasses.field(default=PLAIN, metadata={"static": True})

    @property
    def slots(self) -> int:
        """S."""
        return self.values[0].shape[self.slot_axes[1]]


@partial(
    jax.jit,
    static_argnames=("layers", "batch", "heads", "slots", "head_dim", "dtype", "slot_axes"),
)
def init(
    layers: int,
    batch: int,
    heads: int,
    slots: int,
    head_dim: int,
    dtype,
    slot_axes: tuple[int, int],
) -> KVCache:
    """An empty cache of ``slots`` slots, in one call: each of its arrays would take as long."""

    def empty(slot_axis: int) -> tuple[jax.Array, ...]:
        shape = [batch, heads, head_dim]
        shape.insert(slot_axis, slots)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    return KVCache(
        keys=empty(slot_axes[0]),
        values=empty(slot_axes[1]),
        length=jnp.zeros((batch,), jnp.int32),
        slot_axes=slot_axes,
    )


def write(buffer: jax.Array, rows: jax.Array, offset: jax.Array | int, slot_axis: int) -> jax.Array:
    """Write ``rows``, T along ``slot_axis``, into ``buffer``, S along it, from ``offset`` on.

    ``offset`` is one slot for all rows, or ``[B]``, one for each.
    """
    rows = rows.astype(buffer.dtype)
    offset = jnp.asarray(offset, jnp.int32)
    if offset.ndim == 0:
        return lax.dynamic_update_slice_in_dim(buffer, rows, offset, axis=slot_axis)
    # One small in-place write a row.
    for b in range(buffer.shape[0]):
        start: list[Any] = [b, 0, 0, 0]
        start[slot_axis] = offset[b]
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

    def at(buffer: jax.Array, axis: int) -> jax.Array:
        index = jnp.expand_dims(slots, [i for i in (1, 2, 3) if i != axis])
        return jnp.take_along_axis(buffer, index, axis=axis, mode="promise_in_bounds")

    both = zip((cache.keys, cache.values), cache.slot_axes, strict=True)
    keys, values = lax.optimization_barrier([[at(x, axis) for x in group] for group, axis in both])
    return list(zip(keys, values, strict=True))


def keep(cache: KVCache, slots: jax.Array, count: jax.Array) -> KVCache:
    """Commit accepted rows: move slots ``slots[b, :count[b]]`` to ``length[b]`` and on.

    Args:
      cache: the cache whose scratch slots hold the evaluated block.
      slots: ``[B, P]`` int32, the slot of each accepted token in order; entries from
        ``count`` on may be any slot in range (their rows land above the new length).
      count: ``[B]`` int32, how many to keep, ``0 <= count <= P``.
    """

    def put(buffers, rows, axis: int) -> tuple[jax.Array, ...]:
        both = zip(buffers, rows, strict=True)
        return tuple(write(buffer, row, cache.length, axis) for buffer, row in both)

    keys, values = zip(*take(cache, slots), strict=True)
    return dataclasses.replace(
        cache,
        keys=put(cache.keys, keys, cache.slot_axes[0]),
        values=put(cache.values, values, cache.slot_axes[1]),
        length=cache.length + count,
    )


def settle(cache: KVCache) -> KVCache:
    """Move the pending rows, if any, and expect no more."""
    if cache.pending is None:
        return cache
    moved = keep(cache, jnp.maximum(cache.pending, 0), held(cache) - cache.length)
    return dataclasses.replace(moved, pending=None)
