"""Running the modes in turn, one record a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssd_jax import cli

if TYPE_CHECKING:
    from ssd_jax.generate import GenerationResult

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "topk50": {"temperature": 1.0, "top_k": 50},
}

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


def timed(generate: Callable[[], GenerationResult], stages: Sequence[str]) -> Record:
    """Run; once more if that compiled. The part of a record that a run of ours gives.

    Args:
      generate: decodes the prompt.
      stages: stage names by index.
    """
    result = generate()
    compile_seconds = float(result.stats.compile_seconds)
    if compile_seconds > 0:
        result = generate()
    stats = result.stats
    return {
        "seconds": float(stats.seconds),
        "compile_seconds": compile_seconds,
        "new_tokens": int(stats.new_tokens),
        "characters": len(result.text) if isinstance(result.text, str) else None,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "passes": dict(stats.passes),
        "round_tokens": list(stats.round_tokens),
        "round_passes": {stage: list(count) for stage, count in stats.round_passes.items()},
        "origins": "".join(str(stages.index(origin)) for origin in result.origins),
        "relative_bandwidth": cli.finite(stats.relative_bandwidth),
        "min_margin": cli.finite(stats.min_margin),
    }
