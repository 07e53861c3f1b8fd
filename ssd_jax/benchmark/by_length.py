"""What a round takes by the length of the text, in a long buffer and in one that just fits.

Every round does the same: nothing rests or is narrower, and a draft makes all of its passes
however unlikely its nodes are. So what differs between two lengths is the length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from ssd_jax import decode as engine
from ssd_jax.batch import first_state
from ssd_jax.benchmark.measure import Record
from ssd_jax.plan import Capacities, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack

_GROWTH = 32  # tokens that a text grows by while its rounds are timed


def lengths(context: int) -> list[int]:
    """Lengths of text to measure: 128, 192, 256, 384, 512 and so on, and the context."""
    steps = [
        size for power in range(7, context.bit_length()) for size in (2**power, 3 * 2**power // 2)
    ]
    return [*(size for size in steps if size < context), context]


def rounds_by_length(
    stack: Stack,
    plans: Mapping[str, Plan],
    *,
    texts: Sequence[int] | None = None,
    repeats: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Time a greedy round after random texts, in turns.

    Args:
      stack: the stack.
      plans: by mode.
      texts: lengths that the texts end with, above 32 and at most the context;
        :func:`lengths` of it by default.
      repeats: the median of so many.
      seed: of the texts.
      say: told of the progress.

    Returns:
      A row for each mode and length, in milliseconds: a round, and the prompt with the first
      round, in a buffer of the whole context and in one of just that length.
    """
    context = stack.oracle.config.n_positions
    texts = lengths(context) if texts is None else texts
    random = np.random.default_rng(seed).integers(stack.vocab_size, size=context).tolist()
    rows = []
    for mode, plan in plans.items():
        say(f"{mode}: compiling for {len({*texts, context})} buffers")
        programs = {size: _program(stack, _steady(plan), size) for size in {*texts, context}}
        runs = [
            [
                programs[size](random[: text - _GROWTH], text)
                for text in texts
                for size in (context, text)
            ]
            for _ in range(repeats)
        ]
        medians = 1e3 * np.median(runs, axis=0).reshape(len(texts), 2, 2)
        for text, ((prompt, turn), (prompt_fits, turn_fits)) in zip(texts, medians, strict=True):
            rows.append(
                {
                    "mode": mode,
                    "text": text,
                    f"round, buffer of {context}": float(turn),
                    "round, buffer that fits": float(turn_fits),
                    f"prompt, buffer of {context}": float(prompt),
                    "prompt, buffer that fits": float(prompt_fits),
                }
            )
    return rows


def _steady(plan: Plan) -> Plan:
    """The plan with the same passes in every round."""
    drafts = tuple(replace(draft, threshold=0.0) for draft in plan.drafts)
    return replace(plan.unpaced(), drafts=drafts, floor=0.0)


def _program(stack: Stack, plan: Plan, buffer: int) -> Callable[[list[int], int], tuple]:
    """Decodes a prompt up to a length; says the seconds of the prompt with the first round, and
    of each round after it."""
    models = (stack.oracle, *stack.drafts[: len(plan.drafts)])
    capacities = Capacities.of(plan, buffer)
    tables = stack.tables if plan.uses_trigram else None
    options = (Sampling.create(1), jax.device_put(Policy.of(plan)))

    def start(prompt: list[int], limit: int) -> engine.DecodeState:
        return first_state(models, [prompt], [limit], (), capacities)

    run = engine.decode.lower(
        models, tables, start([0], buffer), *options, np.ones(1, np.int32), capacities=capacities
    ).compile()

    def timed(state: engine.DecodeState, until: int) -> tuple[engine.DecodeState, float]:
        begun = time.perf_counter()
        state = run(models, tables, state, *options, np.array([until], np.int32))
        return jax.block_until_ready(state), time.perf_counter() - begun

    def decode(prompt: list[int], length: int) -> tuple[float, float]:
        state = jax.block_until_ready(start(prompt, length))
        state, first = timed(state, len(prompt) + 1)
        before = int(state.rounds)
        state, rest = timed(state, length)
        return first, rest / max(int(state.rounds) - before, 1)

    return decode
