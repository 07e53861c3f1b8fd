"""What a pass of a model costs on this device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ssd_jax.gpt2 import GPT2


def pass_seconds(
    passes: Sequence[tuple[GPT2, int]], *, slots: int = 256, loops: int = 8, repeats: int = 8
) -> list[float]:
    """Median seconds of passes alone, measured in turns.

    Passes follow each other in a compiled loop, as when decoding: what XLA does once before a
    loop, such as casting weights, is not part of a pass, and neither is Python.

    Args:
      passes: each a model and the tokens of one pass of it; the tokens' choice is part of it.
      slots: of the model's cache; all but the newest are filled.
      loops: passes a loop.
      repeats: measured loops of each.
    """

    def one_pass(model, state):
        tokens, cache = state
        width = tokens.shape[1]
        positions = slots - width + jnp.arange(width)[None]
        seen = jnp.arange(slots) <= positions[..., None]
        logits, cache = model(tokens, positions, mask=seen, cache=cache, offset=slots - width)
        return logits.argmax(-1).astype(jnp.int32), cache

    @partial(jax.jit, donate_argnums=1)
    def run(model, state):
        return lax.fori_loop(0, loops, lambda _, state: one_pass(model, state), state)

    states = [(jnp.ones((1, width), jnp.int32), m.init_cache(1, slots)) for m, width in passes]
    times: list[list[float]] = [[] for _ in passes]
    for turn, (index, (model, _)) in itertools.product(range(repeats + 1), enumerate(passes)):
        start = time.perf_counter()
        states[index] = jax.block_until_ready(run(model, states[index]))
        if turn:  # the first compiles
            times[index].append((time.perf_counter() - start) / loops)
    return [statistics.median(own) for own in times]
