"""``generate``: from a prompt to text, with the stack's drafts switched on or off."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ssd_jax import decode as engine
from ssd_jax import program_cache, tuned
from ssd_jax.errors import PromptError, SamplingError
from ssd_jax.plan import DEFAULT, Capacities, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack, cache_bytes_per_token, weight_bytes

# Tokens between two looks at the text when it is shown as it is written.
_STREAM_TOKENS = 16

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a text came about.

    Attributes:
      new_tokens: tokens generated.
      rounds: oracle passes after the prompt's.
      passes: forward passes after the prompt's, by stage name.
      round_tokens: tokens committed in each round.
      round_passes: ``passes`` round by round.
      round_widths: tokens in the oracle's pass, round by round.
      tokens_per_oracle_pass: ``new_tokens / passes["oracle"]``.
      relative_bandwidth: bytes of weights and cache read per token, over those that plain
        decoding reads for the same text (the paper's Table 1).
      seconds: wall time, prompt included, compilation excluded.
      compile_seconds: wall time until there was a program, 0 if it was at hand.
      from_cache: whether the program was read from the disk instead of compiled, see
        :mod:`ssd_jax.program_cache`.
      min_margin: the smallest score difference by which any token was chosen.
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

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """A continuation.

    Attributes:
      text: the continuation alone, without the end-of-text token ('' without a tokenizer).
      tokens: its token ids, the end-of-text token included if it was reached.
      origins: for each token, the stage that proposed it; ``oracle`` where none had.
      finish_reason: ``eos``, ``length`` (``max_new_tokens``) or ``context``.
      stats: see :class:`Stats`.
    """

    text: str
    tokens: list[int]
    origins: list[str]
    finish_reason: str
    stats: Stats


def generate(
    stack: Stack,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    mode: str = "staged",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    plan: Plan | str | os.PathLike | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue a prompt. Mode and plan change the speed, never the text.

    Args:
      stack: from :func:`ssd_jax.load`.
      prompt: text, or token ids. An empty one starts from the beginning-of-text token.
      max_new_tokens: at most so many tokens.
      mode: ``baseline``, ``speculative`` or ``staged``.
      temperature: 0 for greedy.
      top_k: sample among the k most probable tokens; ``None`` or 0 for all.
      top_p: sample among the most probable tokens that make up this mass; ``None`` for all.
      seed: of the sampling noise. One seed gives one text, whatever the mode.
      plan: a :class:`~ssd_jax.plan.Plan`, a JSON file, or ``"default"`` for the mode's own. Left
        out, mode ``staged`` follows what :func:`ssd_jax.tune` found for this device and stack.
      on_text: called with each new piece of text as it is committed.

    Raises:
      PromptError: no tokenizer for a text prompt, an id out of range, an empty prompt without
        a beginning-of-text token, or a prompt longer than the context.
      SamplingError: an option out of range.
      PlanError: unknown mode, or a plan that asks for stages the stack does not have.
    """
    tokens = encode_prompt(stack, prompt)
    _check_new_tokens(max_new_tokens)
    sampling = Sampling.create(1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    plan, _ = resolve_plan(stack, mode, plan, sampled=temperature > 0)
    watch = _Watcher(stack, len(tokens), on_text) if on_text else None
    return generate_batch(stack, [tokens], max_new_tokens, sampling, plan, watch)[0]


def generate_batch(
    stack: Stack,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    plan: Plan,
    watch: Callable[[engine.DecodeState], None] | None = None,
    capacity: int | None = None,
) -> list[GenerationResult]:
    """Continue several token prompts of any lengths in one compiled loop.

    Args:
      stack: the stack; the plan may use fewer drafts than it has.
      prompts: non-empty lists of token ids, each at most the context long.
      max_new_tokens: for each row.
      sampling: one entry a row.
      plan: how much is drafted.
      watch: called with the state every few tokens.
      capacity: text that the buffers hold; by default just enough for these prompts.
    """
    models = (stack.oracle, *stack.drafts[: len(plan.drafts)])
    context = stack.oracle.config.n_positions
    limits = [min(len(p) + max_new_tokens, context) for p in prompts]
    capacities = Capacities.of(plan, capacity or bucket(max(limits)))
    state = first_state(models, prompts, limits, stack.eos_ids, capacities)
    tables = stack.tables if plan.uses_trigram else None
    arguments = (models, tables, state, sampling, jax.device_put(Policy.of(plan)))
    run, *compilation = _program(arguments, state.limit, capacities)
    started = time.perf_counter()
    state = _run(run, arguments, watch)
    state = jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    host = jax.device_get((state.text, state.length, state.finish, state.rounds, state.trace))
    return [
        _result(stack, models, host, row, len(prompt), context, seconds, *compilation)
        for row, prompt in enumerate(prompts)
    ]


def encode_prompt(stack: Stack, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, checked against vocabulary and context.

    Raises:
      PromptError: see :func:`generate`.
    """
    if isinstance(prompt, str):
        if stack.tokenizer is None:
            raise PromptError(
                "this stack has no tokenizer; load one with tokenizer=, or pass token ids"
            )
        tokens = stack.tokenizer.encode(prompt)
    else:
        tokens = _token_ids(prompt, stack.vocab_size)
    if not tokens:
        if stack.bos_id is None:
            raise PromptError("the prompt is empty and the model has no beginning-of-text token")
        tokens = [stack.bos_id]
    context = stack.oracle.config.n_positions
    if len(tokens) > context:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens but the oracle's context is {context}; shorten it"
        )
    return tokens


def _token_ids(prompt: Sequence[int], vocab: int) -> list[int]:
    try:
        ids = list(np.asarray(prompt).tolist() if hasattr(prompt, "__array__") else prompt)
    except TypeError:
        raise PromptError(f"a prompt is text or token ids, not {type(prompt).__name__}") from None
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise PromptError(f"token ids must be integers, not {token!r}")
        if not 0 <= token < vocab:
            raise PromptError(f"token id {token} is outside the vocabulary (0 to {vocab - 1})")
    return [int(token) for token in ids]


def _check_new_tokens(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise SamplingError(f"max_new_tokens must be a positive integer, not {value!r}")


def resolve_plan(
    stack: Stack, mode: str, plan: Plan | str | os.PathLike | None, *, sampled: bool
) -> tuple[Plan, str]:
    """The plan that ``generate`` follows, and in words where it comes from.

    Args:
      stack: the stack.
      mode: of :data:`~ssd_jax.plan.MODES`.
      plan: a plan, a file, ``"default"``, or ``None`` for the tuned plan, if there is one.
      sampled: whether the temperature is above 0.

    Raises:
      PlanError: see :func:`generate`.
    """
    default = Plan.for_mode(mode, len(stack.drafts), stack.ngram is not None)
    if mode == "staged" and jax.default_backend() == "cpu":
        default = default.on_cpu()
    if plan is None and mode == "staged":
        found = tuned.load(stack)
        plan = found.plans.get(tuned.KINDS[sampled]) if found else None
        if plan is not None:
            return plan, f"tuned for this device ({tuned.path_for(stack)})"
    if plan is None or plan == DEFAULT:
        return default, "default"
    source = "given"
    if not isinstance(plan, Plan):
        source = os.fspath(plan)
        plan = Plan.load(plan)
    plan.check_stack(len(stack.drafts), stack.ngram is not None)
    return plan, source


def bucket(length: int) -> int:
    """Text capacity: the next of 64, 96, 128, 192, 256, 384 ..."""
    size = 64
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def first_state(models, prompts, limits, eos_ids, capacities: Capacities) -> engine.DecodeState:
    """The state before the first round, of token prompts that may grow to ``limits``."""
    text = np.zeros((len(prompts), capacities.text), np.int32)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos = np.full((len(prompts), max(len(eos_ids), 1)), -1, np.int32)
    eos[:, : len(eos_ids)] = eos_ids
    lengths = np.array([len(p) for p in prompts], np.int32)
    return engine.init_state(models, text, lengths, np.array(limits, np.int32), eos, capacities)


_programs: dict[Any, Any] = {}


def _program(arguments, yield_at, capacities: Capacities) -> tuple[Callable, float, bool]:
    """The compiled program for these shapes, the seconds it took to have it just now, and
    whether it came from the disk.

    Compiled ahead of time and kept here, rather than by the first call, so that compilation
    can be timed apart.
    """
    leaves, structure = jax.tree.flatten((arguments, yield_at))
    key = (capacities, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves))
    if key in _programs:
        return _programs[key], 0.0, False
    started = time.perf_counter()
    _LOG.info("compiling")
    lowered = engine.decode.lower(*arguments, yield_at, capacities=capacities)
    with program_cache.keeping() as origin:
        _programs[key] = lowered.compile()
    _LOG.info("decoding")
    return _programs[key], time.perf_counter() - started, origin.kept


def _run(run: Callable, arguments, watch) -> engine.DecodeState:
    models, tables, state, sampling, policy = arguments
    if watch is None:
        return run(models, tables, state, sampling, policy, np.array(state.limit))
    while True:
        yield_at = np.minimum(np.array(state.length) + _STREAM_TOKENS, np.array(state.limit))
        state = run(models, tables, state, sampling, policy, yield_at)
        watch(state)
        if not np.any(np.asarray(state.finish) == engine.RUNNING):
            return state


class _Watcher:
    """Hands on the text of a growing state piece by piece, whole characters only."""

    def __init__(self, stack: Stack, start: int, on_text: Callable[[str], None]):
        self.stack, self.start, self.on_text, self.shown = stack, start, on_text, ""

    def __call__(self, state: engine.DecodeState) -> None:
        length = int(state.length[0])
        finished = int(state.finish[0]) != engine.RUNNING
        tokens = np.asarray(state.text[0, self.start : length]).tolist()
        text = _decode_text(self.stack, tokens)
        if not finished:
            # The last character may still lack bytes that the next token brings.
            text = text.rstrip("\ufffd")
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def _decode_text(stack: Stack, tokens: Sequence[int]) -> str:
    if stack.tokenizer is None:
        return ""
    if tokens and tokens[-1] in stack.eos_ids:
        tokens = tokens[:-1]
    return stack.tokenizer.decode(tokens)


def _result(stack, models, host, row, start, context, *timing) -> GenerationResult:
    text, length, finish, rounds, trace = host
    end = int(length[row])
    tokens = text[row, start:end].tolist()
    cut = "context" if end == context else "length"
    reason = "eos" if finish[row] == engine.ENDED else cut
    names = (*stack.stage_names[: len(models)], "ngram")
    origins = [names[i] for i in trace.origin[row, start:end]]
    stats = _stats(models, names, trace, int(rounds), row, start, end, *timing)
    return GenerationResult(_decode_text(stack, tokens), tokens, origins, reason, stats)


def _stats(
    models, names, trace, rounds, row, start, end, seconds, compile_seconds, from_cache
) -> Stats:
    lengths = trace.length[:rounds, row]
    # A batch goes on until its last row has finished; this row's own rounds are those that
    # found it longer than the one before did.
    committed = np.append(lengths[1:], end) - lengths
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
