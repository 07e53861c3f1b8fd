"""Token prompts on their way through the compiled loop, and what became of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ssd_jax import decode as engine
from ssd_jax import memory, program_cache
from ssd_jax.kv_cache import KVCache
from ssd_jax.memory import cache_bytes_per_token, weight_bytes
from ssd_jax.plan import Capacities, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Flat, Stack

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a text came about.

    Attributes:
      new_tokens: tokens generated.
      rounds: oracle passes after the prompt's.
      passes: forward passes after the prompt's, by stage name; trials of drafts are not counted.
      round_tokens: tokens committed in each round.
      round_passes: ``passes`` round by round.
      round_widths: tokens in the oracle's pass, round by round.
      tokens_per_oracle_pass: ``new_tokens / passes["oracle"]``.
      relative_bandwidth: bytes of weights and cache read per token, over those that plain
        decoding reads for the same text (the paper's Table 1).
      seconds: wall time in the compiled loop, prompt included, compilation excluded; of the whole
        batch where there was one.
      compile_seconds: wall time until there was a program, 0 if it was at hand.
      from_cache: whether the program was read from the disk instead of compiled, see
        :mod:`ssd_jax.program_cache`.
      min_margin: the smallest score difference by which any token was chosen.
      reused_tokens: tokens of the prompt that the oracle's cache already held
        (:class:`ssd_jax.session.Session`).

    Rounds that began after a stop (up to a few, as the text is looked at every few tokens) count
    in ``seconds`` alone.
    """

    new_tokens: int
    rounds: int
    passes: dict[str, int]
    round_tokens: list[int]
    round_passes: dict[str, list[int]]
    round_widths: list[int]
    tokens_per_oracle_pass: float
    relative_bandwidth: float
    seconds: float
    compile_seconds: float
    from_cache: bool
    min_margin: float
    reused_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """A continuation.

    Attributes:
      text: the continuation alone, without what stopped it, be it the end-of-text token or another
        stop ('' without a tokenizer).
      tokens: its token ids, up to the one that completed the stop if there was one.
      origins: for each token, the stage that proposed it; ``oracle`` where none had.
      finish_reason: ``eos``; ``stop`` (a stop string or token sequence); ``length``
        (``max_new_tokens``); ``context``; or ``time``.
      stats: see :class:`Stats`.
      stop_reason: the end-of-text id, the string or the token sequence that ended the text.
      logprobs: each token's log-probability, where asked for.
      top_logprobs: for each token, the most probable tokens at its place with their
        log-probabilities, best first, where asked for.
    """

    text: str
    tokens: list[int]
    origins: list[str]
    finish_reason: str
    stats: Stats
    stop_reason: int | str | tuple[int, ...] | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a continuation ended.

    Attributes:
      text: its text.
      kept: tokens up to there; what the loop wrote after them is dropped.
      reason, cause: see ``finish_reason`` and ``stop_reason`` of :class:`GenerationResult`.
    """

    text: str
    kept: int
    reason: str
    cause: int | str | tuple[int, ...] | None = None


class Batch:
    """Token prompts of any lengths in one compiled loop.

    Args:
      stack: the stack; the plan may use fewer drafts than it has.
      prompts: non-empty lists of token ids, each at most the context long.
      max_new_tokens: for all rows, or for each.
      sampling: one entry a row.
      plan: how much is drafted.
      eos_ids: end-of-text ids of each row; the stack's own by default.
      alternatives: have log-probabilities, with so many alternatives; ``None`` for none.
      capacity: text that the buffers hold; by default just enough for these prompts.
      caches: of an earlier batch of the same capacities, for prompts whose beginnings they hold.

    Raises:
      InsufficientMemoryError: the device has too little memory left, here or in :meth:`advance`.

    Attributes:
      state: of the engine.
      intact: whether ``state`` can be used: not after a run that was interrupted.
      text: ``[B, S']`` int32, ``length``, ``limit``: ``[B]`` int32, the state's on the host.
      seconds: in the compiled loop up to now.
    """

    def __init__(
        self,
        stack: Stack,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
        plan: Plan,
        *,
        eos_ids: Sequence[Sequence[int]] | None = None,
        alternatives: int | None = None,
        capacity: int | None = None,
        caches: tuple[KVCache, ...] | None = None,
    ):
        self.stack, self.starts = stack, [len(prompt) for prompt in prompts]
        self.models = (stack.oracle, *stack.drafts[: len(plan.drafts)])
        self.eos_ids = [stack.eos_ids] * len(prompts) if eos_ids is None else eos_ids
        limits = np.add(self.starts, max_new_tokens)
        limits = np.minimum(limits, stack.oracle.config.n_positions).tolist()
        self.capacities = Capacities.of(plan, capacity or bucket(max(limits)))
        if caches is None:
            needed = memory.estimate(self.models, self.capacities, len(prompts))
            memory.check(needed.caches + needed.passes, self._words, memory.BATCH_REMEDY)
        self.reused = [0] * len(prompts) if caches is None else caches[0].length.tolist()
        with memory.reported(self._words):
            self.state = first_state(
                self.models,
                prompts,
                limits,
                self.eos_ids,
                self.capacities,
                alternatives=_traced_alternatives(alternatives, stack.vocab_size),
                caches=caches,
            )
            self._parts = stack.flat(len(plan.drafts), plan.uses_trigram)
            self._rest = jax.device_put((sampling, Policy.of(plan)))
            arguments = (self._parts, self.state, *self._rest, self.state.limit)
            self._program, *self._compilation = _program(arguments, self.capacities)
        self.seconds = 0.0
        self.intact = True
        self._look()

    def _look(self) -> None:
        """Fetch what callers ask for between two runs of the loop."""
        state = self.state
        self.text, self.length, self.limit, self._finish = map(
            np.array, jax.device_get((state.text, state.length, state.limit, state.finish))
        )

    @property
    def _words(self) -> str:
        return f"a batch of {len(self.starts)} rows of {self.capacities.text} tokens"

    @property
    def running(self) -> bool:
        return bool(np.any(self._finish == engine.RUNNING))

    def finished(self, row: int) -> bool:
        return bool(self._finish[row] != engine.RUNNING)

    def tokens(self, row: int) -> list[int]:
        """The continuation of a row as it stands."""
        return self.text[row, self.starts[row] : self.length[row]].tolist()

    def advance(self, tokens: int | None = None) -> None:
        """Run until all unfinished rows have so many tokens more, or to the end."""
        yield_at = self.limit if tokens is None else np.minimum(self.length + tokens, self.limit)
        started = time.perf_counter()
        self.intact = False  # the state is donated: if this is interrupted, it is lost
        with memory.reported(self._words):
            self.state = self._program(self._parts, self.state, *self._rest, yield_at)
            jax.block_until_ready(self.state)
        self.intact = True
        self.seconds += time.perf_counter() - started
        self._look()

    def halt(self, rows: Sequence[int]) -> None:
        """Let some rows be finished where they are."""
        if rows:
            self._finish[list(rows)] = engine.LIMITED
            self.state = dataclasses.replace(self.state, finish=jax.device_put(self._finish))

    def ending(self, row: int) -> Ending:
        """How a row ended by the loop's own conditions, with all of its text."""
        tokens = self.tokens(row)
        ended = self._finish[row] == engine.ENDED
        text = ""
        if self.stack.tokenizer is not None:
            text = self.stack.tokenizer.decode(tokens[:-1] if ended else tokens)
        if ended:
            return Ending(text, len(tokens), "eos", tokens[-1])
        full = self.length[row] == self.stack.oracle.config.n_positions
        return Ending(text, len(tokens), "context" if full else "length")

    def results(
        self, endings: Sequence[Ending], logprobs: Sequence[int | None]
    ) -> list[GenerationResult]:
        """What became of the first rows: of those that have an ending.

        Args:
          endings: how each ended.
          logprobs: the alternatives each wants; ``None`` for no log-probabilities.
        """
        rounds, trace = jax.device_get((self.state.rounds, self.state.trace))
        return [
            self._result(row, ending, logprobs[row], int(rounds), trace)
            for row, ending in enumerate(endings)
        ]

    def _result(
        self, row: int, ending: Ending, alternatives: int | None, rounds: int, trace
    ) -> GenerationResult:
        start, end = self.starts[row], self.starts[row] + ending.kept
        names = (*self.stack.stage_names[: len(self.models)], "ngram")
        seconds = (self.seconds, *self._compilation)
        stats = _stats(self.models, names, trace, rounds, row, start, end, *seconds)
        chosen = top = None
        if alternatives is not None:
            chosen = trace.log_probs.chosen[row, start:end].tolist()
            top = [
                dict(zip(tokens[:alternatives], values[:alternatives], strict=True))
                for tokens, values in zip(
                    trace.log_probs.top_token[row, start:end].tolist(),
                    trace.log_probs.top[row, start:end].tolist(),
                    strict=True,
                )
            ]
        return GenerationResult(
            text=ending.text,
            tokens=self.text[row, start:end].tolist(),
            origins=[names[i] for i in trace.origin[row, start:end]],
            finish_reason=ending.reason,
            stats=dataclasses.replace(stats, reused_tokens=self.reused[row]),
            stop_reason=ending.cause,
            logprobs=chosen,
            top_logprobs=top,
        )


def generate_batch(
    stack: Stack,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    plan: Plan,
    capacity: int | None = None,
) -> list[GenerationResult]:
    """Run a :class:`Batch` to its end. For arguments see there."""
    batch = Batch(stack, prompts, max_new_tokens, sampling, plan, capacity=capacity)
    batch.advance()
    rows = range(len(prompts))
    return batch.results([batch.ending(row) for row in rows], [None for _ in rows])


def bucket(length: int) -> int:
    """Text capacity: the next of 64, 96, 128, 192, 256, 384 ..."""
    return max(64, _round_size(length))


def batch_bucket(rows: int) -> int:
    """Rows that are compiled for: the next of 1, 2, 3, 4, 6, 8, 12 ..."""
    return _round_size(rows)


def _round_size(count: int) -> int:
    """The next power of two, or three quarters of it where that is enough."""
    size = 1 << (count - 1).bit_length()
    return size * 3 // 4 if size >= 4 and size * 3 // 4 >= count else size


def first_state(
    models,
    prompts,
    limits,
    eos_ids,
    capacities: Capacities,
    *,
    alternatives: int | None = None,
    caches: tuple[KVCache, ...] | None = None,
) -> engine.DecodeState:
    """The state before the first round, of token prompts that may grow to ``limits``.

    ``eos_ids`` are those of all rows, or a sequence for each. For the rest see
    :func:`ssd_jax.decode.init_state`.
    """
    rows = len(prompts)
    text = np.zeros((rows, capacities.text), np.int32)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = prompt
    each = eos_ids if eos_ids and not isinstance(eos_ids[0], int) else [eos_ids] * rows
    eos = np.full((rows, _power_of_two(max(map(len, each)))), -1, np.int32)
    for row, ids in zip(eos, each, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(p) for p in prompts], np.int32)
    return engine.init_state(
        models,
        text,
        lengths,
        np.array(limits, np.int32),
        eos,
        capacities,
        alternatives=alternatives,
        caches=caches,
    )


def _traced_alternatives(wanted: int | None, vocab: int) -> int | None:
    return None if wanted is None else min(_power_of_two(wanted), vocab)


def _power_of_two(count: int) -> int:
    """The next power of two, at least 1: shapes that users choose take few values."""
    return 1 << max(count - 1, 0).bit_length()


_programs: dict[Any, Callable] = {}  # the least recently used first
_programs_lock = threading.Lock()


@functools.partial(jax.jit, static_argnames="capacities", donate_argnames="state")
def decode(parts: Flat, state, sampling, policy, yield_at, *, capacities):
    """:func:`ssd_jax.decode.decode` of a stack's flattened parts."""
    loop = inspect.unwrap(engine.decode)  # a jit within a jit would keep traces of its own
    return loop(*parts.tree, state, sampling, policy, yield_at, capacities=capacities)


def _program(arguments, capacities: Capacities) -> tuple[Callable, float, bool]:
    """The compiled program for these shapes, the seconds it took to have it just now, and
    whether it came from the disk.

    Compiled ahead of time and kept here, rather than by the first call, so that compilation
    can be timed apart.
    """
    leaves, structure = jax.tree.flatten(arguments)
    key = (capacities, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves))
    with _programs_lock:
        if (program := _programs.pop(key, None)) is not None:
            _programs[key] = program
            return program, 0.0, False
        _make_room()
    started = time.perf_counter()
    _LOG.info("compiling")
    lowered = decode.lower(*arguments, capacities=capacities)
    with program_cache.keeping() as origin:
        program = lowered.compile()
    with _programs_lock:
        _programs[key] = program
    _LOG.info("decoding")
    return program, time.perf_counter() - started, origin.kept


def _make_room() -> None:
    """Drop programs while the process has half of the memory mappings that it may have.

    A CPU's program takes more than a thousand, an oracle of many layers several; one too many,
    and XLA takes the process down.
    """
    loop: Any = decode
    before, used = math.inf, memory.mappings()
    # Where dropping does not help, the mappings are not programs'.
    while _programs and 0.5 < used < before:
        del _programs[next(iter(_programs))]
        loop.clear_cache()  # JAX's own reference to it, those of the others too
        before, used = used, memory.mappings()


def _stats(
    models, names, trace, rounds, row, start, end, seconds, compile_seconds, from_cache
) -> Stats:
    lengths = trace.length[:rounds, row]
    # A batch goes on until its last row has finished, and may go on beyond a stop; this row's own
    # rounds are those that found it longer than the one before did, up to there.
    committed = np.minimum(np.append(lengths[1:], end), end) - np.minimum(lengths, end)
    own = committed > 0
    passes = trace.passes[:rounds][own]
    weights = np.array([weight_bytes(m) for m in models], np.float64)
    per_token = np.array([cache_bytes_per_token(m) for m in models], np.float64)
    read = np.sum(passes * (weights + per_token * lengths[own][:, None]))
    plain = np.sum(weights[0] + per_token[0] * np.arange(start, end))
    oracle_passes = int(passes[:, 0].sum())
    return Stats(
        new_tokens=end - start,
        rounds=int(own.sum()),
        passes={name: int(n) for name, n in zip(names, passes.sum(axis=0), strict=False)},
        round_tokens=committed[own].tolist(),
        round_passes={name: n.tolist() for name, n in zip(names, passes.T, strict=False)},
        round_widths=trace.width[:rounds][own].tolist(),
        tokens_per_oracle_pass=(end - start) / max(oracle_passes, 1),
        relative_bandwidth=float(read / plain) if end > start else 0.0,
        seconds=seconds,
        compile_seconds=compile_seconds,
        from_cache=from_cache,
        min_margin=float(np.min(trace.margin[row, start:end], initial=np.inf)),
    )
