"""Running the modes in turn, one record a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssd_jax.comparison import finite

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult
    from ssd_jax.benchmark.peers import PeerRun
    from ssd_jax.stack import Stack

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "topk50": {"temperature": 1.0, "top_k": 50},
}


def is_sampled(sampling: str) -> bool:
    """Whether a key of :data:`SAMPLINGS` draws its tokens."""
    return SAMPLINGS[sampling]["temperature"] > 0


Record = dict[str, Any]
Runner = Callable[..., Record]  # called as runner(prompt, seed=..., **sampling options)


def run(
    runners: Mapping[str, Runner],
    prompts: Sequence[str],
    *,
    samplings: Sequence[str],
    repeats: int,
    seed: int = 0,
    done: Iterable[tuple[int, str, int]] = (),
) -> Iterator[list[Record]]:
    """Measure, yielding the records of all modes for a prompt, sampling and repeat at a time.

    Args:
      runners: by mode; they take turns within every repeat of every prompt.
      prompts: prompt ``i`` is decoded with seed ``seed + i``.
      samplings: keys of :data:`SAMPLINGS`.
      repeats: recorded runs of each combination.
      seed: the first prompt's.
      done: combinations of prompt, sampling and repeat that are left out.
    """
    done = set(done)
    for index, prompt in enumerate(prompts):
        for sampling in samplings:
            for repeat in range(repeats):
                if (index, sampling, repeat) not in done:
                    yield [
                        {"prompt": index, "mode": mode, "sampling": sampling, "repeat": repeat}
                        | runner(prompt, seed=seed + index, **SAMPLINGS[sampling])
                        for mode, runner in runners.items()
                    ]


def combination(record: Record) -> tuple[int, str, int]:
    """Prompt, sampling and repeat: what the modes take turns in."""
    return record["prompt"], record["sampling"], record["repeat"]


def timed(generate: Callable[[], GenerationResult], stack: Stack) -> Record:
    """The part of a record that a run of ours gives.

    Args:
      generate: decodes the prompt.
      stack: with what.
    """
    result, seconds, compile_seconds = clocked(generate)
    stats = result.stats
    return {
        "dtype": stack.oracle.numerics,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "new_tokens": int(stats.new_tokens),
        "characters": len(result.text) if isinstance(result.text, str) else None,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "passes": dict(stats.passes),
        "round_tokens": list(stats.round_tokens),
        "round_passes": {stage: list(count) for stage, count in stats.round_passes.items()},
        "round_widths": list(stats.round_widths),
        "origins": "".join(str(stack.stage_names.index(origin)) for origin in result.origins),
        "relative_bandwidth": finite(stats.relative_bandwidth),
        "min_margin": finite(stats.min_margin),
    }


def clocked(generate: Callable[[], GenerationResult]) -> tuple[GenerationResult, float, float]:
    """Run; once more if that compiled.

    Returns:
      What came of it; the seconds of the whole call, as peers are timed, since the loop alone would
      leave out what comes before and after it; and those that the first run compiled for.
    """

    def once() -> tuple[GenerationResult, float]:
        started = time.perf_counter()
        return generate(), time.perf_counter() - started

    result, seconds = once()
    compile_seconds = float(result.stats.compile_seconds)
    if compile_seconds > 0:
        result, seconds = once()
    return result, seconds, compile_seconds


def told_by_a_peer(run: PeerRun, dtype: str, prompt: Sequence[int], stack: Stack) -> Record:
    """The part of a record that a peer's run gives; what it does not tell is ``None``."""
    ended = bool(run.tokens) and run.tokens[-1] in stack.eos_ids
    full = len(prompt) + len(run.tokens) == stack.oracle.config.n_positions
    text = run.tokens[:-1] if ended else run.tokens
    return {
        "dtype": dtype,
        "prompt_tokens": len(prompt),
        "seconds": run.seconds,
        "compile_seconds": 0.0,
        "new_tokens": len(run.tokens),
        "characters": len(stack.tokenizer.decode(text)) if stack.tokenizer else None,
        "tokens": run.tokens,
        "finish_reason": "eos" if ended else "context" if full else "length",
        "passes": {} if run.oracle_passes is None else {"oracle": run.oracle_passes},
        "round_tokens": None,
        "round_passes": None,
        "round_widths": None,
        "origins": None,
        "relative_bandwidth": None,
        "min_margin": None,
    }
