"""Work over the filled part of a buffer: what it costs follows the text, not the buffer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_SHORTEST = 256


def spans(size: int, *, finely: bool = False) -> list[int]:
    """How much of a buffer may be looked at: 256, its doubles up to half the buffer, or all.

    Beyond half, reading a part apart costs a CPU about what it saves, unless much is done with it:
    ``finely`` is from 128 on, with all doubles.
    """
    shortest, most = (_SHORTEST // 2, size - 1) if finely else (_SHORTEST, size // 2)
    found = []
    while (span := shortest << len(found)) <= most:
        found.append(span)
    return [*found, size]


def within(
    end: jax.Array,
    size: int,
    look: Callable[[int], jax.Array],
    *,
    branch: bool = False,
    finely: bool = False,
) -> jax.Array:
    """``look(span)`` with the least of :func:`spans` that holds the first ``end`` of ``size``.

    Every span is compiled, so ``look`` is to be small, and is to read buffers only: a branch that
    wrote one would copy it. On other platforms than a CPU it is ``look(size)``, without a branch:
    there kernels are the cost, and one launches for a short span as for a long one.

    Args:
      end: int32.
      size: of the buffer.
      look: traced once a span.
      branch: have two spans at least.
      finely: see :func:`spans`.
    """
    choices = spans(size, finely=finely)
    if branch and len(choices) == 1:
        choices = [size // 2, size]
    if len(choices) == 1:
        return look(size)
    fits = jnp.sum(end > jnp.array(choices[:-1]), dtype=jnp.int32)
    branches = [partial(look, span) for span in choices]
    return lax.platform_dependent(cpu=lambda: lax.switch(fits, branches), default=branches[-1])
