"""What a pass of a model costs on this device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.gpt2 import GPT2


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """What a pass of each stage takes, by its width.

    Attributes:
      seconds: by stage name, then by width in tokens.
      slots: filled slots of the cache that the passes attended to.
    """

    seconds: Mapping[str, Mapping[int, float]]
    slots: int

    def of(self, stage: str, width: int) -> float:
        """Seconds of a pass, between and beyond the measured widths in a straight line."""
        known = sorted(self.seconds[stage].items())
        widths, seconds = (np.array(column, float) for column in zip(*known, strict=True))
        if width > widths[-1] and len(known) > 1:
            slope = max((seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2]), 0.0)
            return float(seconds[-1] + slope * (width - widths[-1]))
        return float(np.interp(width, widths, seconds))


class PassClock:
    """Times passes of models alone, in turns.

    Passes follow each other in a compiled loop, as when decoding: what XLA does once before a
    loop, such as casting weights, is no part of a pass, and neither is Python.

    Attributes:
      seconds: of each pass, by its name, one entry for each turn.
    """

    def __init__(
        self,
        passes: Mapping[Any, tuple[GPT2, int]],
        *,
        slots: int = 256,
        loop_seconds: float = 0.05,
        logits: bool = True,
    ):
        """Compiles.

        Args:
          passes: by any names, each a model and the tokens of one pass of it; the tokens' choice is
            part of it.
          slots: of the model's cache; all but the newest are filled.
          loop_seconds: a loop makes at least as many passes as this takes.
          logits: whether a pass ends with logits, or as those over a prompt with the last keys.
        """

        def one_pass(model, state):
            tokens, cache = state
            width = tokens.shape[1]
            positions = slots - width + jnp.arange(width)[None]
            seen = jnp.arange(slots) <= positions[..., None]
            scores, cache = model(tokens, positions, mask=seen, cache=cache, offset=slots - width)
            chosen = scores.argmax(-1).astype(jnp.int32)
            # Other tokens each time, so that nothing can be computed once for all passes.
            return chosen if logits else (tokens + 1) % model.config.vocab_size, cache

        @partial(jax.jit, donate_argnums=1)
        def loop(model, state, count):
            return lax.fori_loop(0, count, lambda _, state: one_pass(model, state), state)

        self._loop = loop
        self._models = {name: model for name, (model, _) in passes.items()}
        self._states = {
            name: (jnp.ones((1, width), jnp.int32), model.init_cache(1, slots))
            for name, (model, width) in passes.items()
        }
        self._counts = {}
        for name in passes:
            self._run(name, 4)  # compiles
            self._counts[name] = 4 + int(4 * loop_seconds / self._run(name, 4))
        self.seconds: dict[Any, list[float]] = {name: [] for name in passes}

    def turn(self) -> None:
        """One loop of each pass, after a pass that brings its weights back into the caches."""
        for name, count in self._counts.items():
            self._run(name, 1)
            self.seconds[name].append(self._run(name, count) / count)

    def _run(self, name: Any, count: int) -> float:
        start = time.perf_counter()
        loop = self._loop(self._models[name], self._states[name], count)
        self._states[name] = jax.block_until_ready(loop)
        return time.perf_counter() - start


def pass_seconds(
    passes: Sequence[tuple[GPT2, int]], *, repeats: int = 8, **options: Any
) -> list[float]:
    """Median seconds of passes alone, of ``repeats`` turns of a :class:`PassClock`, whose options
    the others are."""
    clock = PassClock(dict(enumerate(passes)), **options)
    for _ in range(repeats):
        clock.turn()
    return [statistics.median(own) for own in clock.seconds.values()]


def pass_costs(
    models: Mapping[str, GPT2],
    widths: Mapping[str, Iterable[int]],
    *,
    slots: int,
    repeats: int = 8,
) -> PassCosts:
    """:func:`pass_seconds` of some widths of each of some models by stage name."""
    pairs = [(name, width) for name, own in widths.items() for width in dict.fromkeys(own)]
    passes = [(models[name], width) for name, width in pairs]
    seconds: dict[str, dict[int, float]] = {name: {} for name in widths}
    times = pass_seconds(passes, slots=slots, repeats=repeats)
    for (name, width), own in zip(pairs, times, strict=True):
        seconds[name][width] = own
    return PassCosts(seconds, slots)


def roofline(dtype: jnp.dtype, *, size: int = 8192, repeats: int = 10) -> tuple[float, float]:
    """Bytes and floating-point operations that this device manages in a second.

    Args:
      dtype: of the operands.
      size: rows and columns of a matrix that no cache holds. Its product with a vector streams
        it once; a quarter of it in each direction, times itself, has an operand for every use.
      repeats: the best of so many.

    Returns:
      The two rates.
    """
    wide = jnp.ones((size, size), dtype)
    square = jnp.ones((size // 4, size // 4), dtype)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))

    def best(left: jax.Array, right: jax.Array) -> float:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(multiply(left, right))
            times.append(time.perf_counter() - start)
        return min(times[1:])  # the first compiles

    return wide.nbytes / best(wide, wide[:, :1]), 2 * (size // 4) ** 3 / best(square, square)
