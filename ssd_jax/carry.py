"""A loop that carries its small arrays as one.

A GPU spends a kernel or two on each array that a loop carries and its body changes: one that
computes it, and one that copies it where the old value is read after the new one is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Entries of the largest array that counts as small: all are written anew in every trip.
_SMALL = 32


def while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], init: Any) -> Any:
    """``lax.while_loop``, to the bit; small arrays of 32-bit numbers are carried as one of int32.

    What the body does not change is better left out of the carry, as an array that is carried by
    itself costs nothing then.
    """
    leaves, structure = jax.tree.flatten(init)
    small = [leaf.size <= _SMALL and leaf.dtype.itemsize == 4 for leaf in leaves]
    ends = np.cumsum([leaf.size if fits else 0 for leaf, fits in zip(leaves, small, strict=True)])

    def pack(carry: Any) -> tuple[jax.Array, list[jax.Array]]:
        parts = list(zip(structure.flatten_up_to(carry), small, strict=True))
        words = [part.reshape(-1).view(jnp.int32) for part, fits in parts if fits]
        words = jnp.concatenate([jnp.zeros(0, jnp.int32), *words])
        return words, [part for part, fits in parts if not fits]

    def unpack(packed: tuple[jax.Array, list[jax.Array]]) -> Any:
        words, large = packed
        rest = iter(large)
        return structure.unflatten(
            words[end - leaf.size : end].reshape(leaf.shape).view(leaf.dtype)
            if fits
            else next(rest)
            for leaf, fits, end in zip(leaves, small, ends, strict=True)
        )

    found = lax.while_loop(
        lambda packed: cond(unpack(packed)), lambda packed: pack(body(unpack(packed))), pack(init)
    )
    return unpack(found)
