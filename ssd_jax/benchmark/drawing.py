"""The report's plots, laid out here and drawn by the page, in its colours."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ssd_jax.benchmark.summary import BASELINE, by_prompt, own_first, speedups
from ssd_jax.pages.wording import (
    bytes_,
    flops,
    percent,
    times,
)
from ssd_jax.plan import MODES

Record = dict[str, Any]

WIDTH = 380.0  # of every plot, in its own units: about a phone's, so that its text stays legible


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale from values to places: ``low`` to ``high`` on ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values, at most 8."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
            parts = (1,) if last - first > 2 else (1, 2, 5)
            places = [part * 10.0**k for k in range(first, last + 1) for part in parts]
            inside = [value for value in places if self.low <= value <= self.high]
            return inside[:: 1 + len(inside) // 8]
        span = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(span))
        step = next(s * unit for s in (0.2, 0.5, 1, 2) if span / (s * unit) <= 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 10) for k in range(first, last + 1)]

    def marks(self, form: Callable[[float], str]) -> list[tuple[float, str]]:
        return [(self(value), form(value)) for value in self.ticks()]


def swarm_plots(document: dict) -> Record | None:
    """Figure 2: one plot a sampling, one swarm of dots a mode, one dot a prompt."""
    records: list[Record] = document.get("records") or []
    ratios: dict[str, dict[str, dict[int, float]]] = {}
    over: dict[str, str] = {}
    for sampling, modes in (document.get("summary") or {}).items():
        own = {
            mode: by_prompt(r for r in records if (r["sampling"], r["mode"]) == (sampling, mode))
            for mode in modes
        }
        baselines = [
            (figures["tokens_per_second"], mode)
            for mode, figures in modes.items()
            if mode.startswith(BASELINE) and figures.get("tokens_per_second")
        ]
        if baselines:
            over[sampling] = max(baselines)[1]
            found = {
                mode: values
                for mode in MODES
                if mode != BASELINE
                and mode in own
                and (values := speedups(own[mode], own[over[sampling]]))
            }
            if found:
                ratios[sampling] = found
    if not ratios:
        return None
    every = [v for modes in ratios.values() for values in modes.values() for v in values.values()]
    axis = Axis(0.0, max(1.2, 1.04 * max(every)), 8.0, WIDTH - 10)
    return {
        "axis": axis.marks(lambda value: f"{value:g}×"),
        "one": axis(1.0),
        "panels": [
            {
                "sampling": sampling,
                "over": over[sampling],
                "rows": [
                    {
                        "mode": mode,
                        "median": axis(median := statistics.median(values.values())),
                        "words": f"median {times(median)}, {times(min(values.values()))}"
                        f" to {times(max(values.values()))}",
                        "dots": [
                            (x, y, f"prompt {prompt}: {times(values[prompt])}")
                            for prompt, x, y in _swarm(values, axis)
                        ],
                    }
                    for mode, values in modes.items()
                ],
            }
            for sampling, modes in ratios.items()
        ],
    }


def _swarm(
    values: Mapping[int, float], axis: Axis, size: float = 5.0, half: float = 24.0
) -> list[tuple[int, float, float]]:
    """Dots ``(key, x, y)``, those of one place side by side about ``y = 0``."""
    bins: dict[int, list[int]] = {}
    for key, value in sorted(values.items(), key=lambda item: item[1]):
        bins.setdefault(round(axis(value) / size), []).append(key)
    step = min(size, 2 * half / max(len(keys) for keys in bins.values()))
    return [
        (key, axis(values[key]), round(step * ((n + 1) // 2) * (-1) ** n, 1))
        for keys in bins.values()
        for n, key in enumerate(keys)
    ]


def acceptance_plots(summary: Record) -> list[Record]:
    """Of each sampling, a curve a mode: how often a guess at a depth was accepted."""
    shares = {
        sampling: {
            mode: own["acceptance_by_depth"]
            for mode, own in own_first(modes)
            if own.get("acceptance_by_depth")
        }
        for sampling, modes in summary.items()
    }
    deepest = max((len(s) for modes in shares.values() for s in modes.values()), default=0)
    if not deepest:
        return []
    across, up = Axis(1, max(2, deepest), 44.0, WIDTH - 14), Axis(0, 1, 200.0, 30.0)
    every = max(1, math.ceil(deepest / 12))
    return [
        {
            "sampling": sampling,
            "across": [(across(d), f"{d}") for d in range(1, deepest + 1, every)],
            "up": up.marks(percent),
            "curves": [
                {
                    "mode": mode,
                    "kind": "staged" if mode == "staged" else "speculative",
                    "points": [
                        (across(depth), up(share), f"{mode}, depth {depth}: {percent(share)}")
                        for depth, share in enumerate(own, 1)
                    ],
                }
                for mode, own in modes.items()
            ],
        }
        for sampling, modes in shares.items()
        if modes
    ]


def roofline_plot(roofline: Record | None) -> Record | None:
    """Figure 1: what a device can do at an arithmetic intensity, and what the modes do."""
    if not roofline or not roofline.get("bandwidth") or not roofline.get("flops"):
        return None
    bandwidth, peak = roofline["bandwidth"], roofline["flops"]
    points = [p for p in roofline.get("points") or [] if p["intensity"] > 0 and p["flops"] > 0]
    ridge = peak / bandwidth
    intensities = [ridge, *(point["intensity"] for point in points)]
    low, high = min(intensities) / 3, max(intensities) * 4
    floor = min([bandwidth * low, *(point["flops"] for point in points)]) / 2
    across = Axis(low, high, 52.0, WIDTH - 12, log=True)
    up = Axis(floor, 3 * peak, 240.0, 12.0, log=True)
    return {
        "across": across.marks(lambda value: f"{value:g}"),
        "up": up.marks(flops),
        "roof": [
            (across(low), up(bandwidth * low)),
            (across(ridge), up(peak)),
            (across(high), up(peak)),
        ],
        "ridge": f"{ridge:.3g}",
        "bandwidth": f"{bytes_(bandwidth)}/s",
        "flops": flops(peak),
        "points": [
            {
                "x": across(point["intensity"]),
                "y": up(point["flops"]),
                "name": point["name"],
                "intensity": f"{point['intensity']:.3g}",
                "flops": flops(point["flops"]),
                "share": point["flops"] / min(peak, bandwidth * point["intensity"]),
            }
            for point in points
        ],
    }
