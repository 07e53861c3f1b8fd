"""The modes of one prompt, measured one beside the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult

REPEATS = 3  # odd, so that the median is one of the runs


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One mode on one prompt: the run that compiled, and timed runs of the compiled program."""

    warm_up: GenerationResult
    timed: list[GenerationResult]

    @property
    def median(self) -> GenerationResult:
        """The timed run of median duration (the warm-up where nothing was timed)."""
        runs = sorted(self.timed or [self.warm_up], key=lambda run: run.stats.seconds)
        return runs[len(runs) // 2]

    def agrees_with(self, tokens: Sequence[int]) -> bool:
        return all(list(run.tokens) == list(tokens) for run in (self.warm_up, *self.timed))


def measure(
    decode: Callable[[str], GenerationResult],
    warm_ups: dict[str, GenerationResult],
    repeats: int = REPEATS,
) -> dict[str, Measurement]:
    """Run every mode of ``warm_ups`` ``repeats`` times more, the modes taking turns.

    Taking turns spreads a passing disturbance of the machine over all modes.
    """
    timed: dict[str, list[GenerationResult]] = {mode: [] for mode in warm_ups}
    for _ in range(repeats):
        for mode, runs in timed.items():
            runs.append(decode(mode))
    return {mode: Measurement(warm_ups[mode], timed[mode]) for mode in warm_ups}


def finite(value: Any) -> float | None:
    """A float fit for JSON, which has no infinity and no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


def describe(measurement: Measurement) -> dict[str, Any]:
    """The figures of one mode, as ``--json`` prints them; seconds exclude compilation."""
    result, stats = measurement.median, measurement.median.stats
    return {
        "new_tokens": int(stats.new_tokens),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "seconds": finite(stats.seconds),
        "compile_seconds": finite(measurement.warm_up.stats.compile_seconds),
        "from_cache": measurement.warm_up.stats.from_cache,
        "tokens_per_second": finite(stats.tokens_per_second),
        "rounds": int(stats.rounds),
        "tokens_per_oracle_pass": finite(stats.tokens_per_oracle_pass),
        "passes": {stage: int(count) for stage, count in stats.passes.items()},
        "relative_bandwidth": finite(stats.relative_bandwidth),
    }


def json_object(mode: str, measurements: dict[str, Measurement]) -> dict[str, Any]:
    """The object of ``--json``: ``mode``'s own, with ``compare`` where several were measured."""
    result = measurements[mode].median
    document = {
        "text": result.text,
        "tokens": [int(token) for token in result.tokens],
        "origins": list(result.origins),
        "mode": mode,
        **describe(measurements[mode]),
    }
    if result.logprobs is not None:
        document["logprobs"] = [finite(value) for value in result.logprobs]
        document["top_logprobs"] = [
            [{"token": token, "logprob": finite(value)} for token, value in top.items()]
            for top in result.top_logprobs or ()
        ]
    if len(measurements) > 1:
        document["compare"] = {name: describe(m) for name, m in measurements.items()}
        document["output_identical"] = output_identical(measurements)
    return document


def output_identical(measurements: dict[str, Measurement]) -> bool:
    """Whether every run of every mode wrote the tokens of the baseline."""
    expected = measurements["baseline"].median.tokens
    return all(measurement.agrees_with(expected) for measurement in measurements.values())


def comparison_table(measurements: dict[str, Measurement]):
    """A rich table of the modes: speed, and what it comes from."""
    from rich.table import Table

    table = Table()
    table.add_column("mode")
    for heading in ("tokens/s", "speed-up", "tokens per oracle pass", "relative bandwidth"):
        table.add_column(heading, justify="right")
    base = measurements["baseline"].median.stats.tokens_per_second
    for mode, measurement in measurements.items():
        stats = measurement.median.stats
        table.add_row(
            mode,
            f"{stats.tokens_per_second:.1f}",
            f"{stats.tokens_per_second / base:.2f}x" if base > 0 else "-",
            f"{stats.tokens_per_oracle_pass:.2f}",
            f"{stats.relative_bandwidth:.2f}",
        )
    return table
