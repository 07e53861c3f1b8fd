"""The log of a training run: losses step by step, progress, curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssd_jax.files import atomic_path
from ssd_jax.training.config import TrainConfig


class Log:
    """JSON lines (one a step) and progress lines (one every ``log_every`` steps)."""

    def __init__(self, path: Path, step: int, settings: TrainConfig, say: Callable[[str], None]):
        self._path, self._settings, self._say = path, settings, say
        kept = [row for row in read_log(path) if row["step"] <= step] if path.exists() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._mark, self._tokens = (step, time.perf_counter()), 0
        if step:
            say(f"resuming at step {step} of {settings.steps}")

    def add(self, step: int, metrics: dict, evaluated: dict[str, float]) -> None:
        row = {"step": step} | {k: float(v) for k, v in metrics.items()} | evaluated
        self._tokens += int(row["tokens"])
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if step % self._settings.log_every == 0 or evaluated:
            self._progress(row)

    def _progress(self, row: dict) -> None:
        (last, then), now = self._mark, time.perf_counter()
        seconds = (now - then) / max(row["step"] - last, 1)
        rate = self._tokens / max(now - then, 1e-9)
        self._mark, self._tokens = (row["step"], now), 0
        left = duration((self._settings.steps - row["step"]) * seconds)
        losses = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("step", "tokens"))
        self._say(
            f"step {row['step']}/{self._settings.steps}: {losses}; {rate:.0f} tokens/s, {left} left"
        )


def read_log(path: Path) -> list[dict]:
    """The rows of a JSON-lines log; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot(log: Path, image: Path) -> None:
    """Draw the loss curves; without matplotlib, which is optional, draw nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_log(log)
    tokens = np.cumsum([row["tokens"] for row in rows]) / 1e6
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for color, name in (("C0", "cross_entropy"), ("C1", "kl")):
        having = [name in row for row in rows]  # a run may go on with another loss
        if not any(having):
            continue
        values, at = np.array([row[name] for row in rows if name in row]), tokens[having]
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        label = name.replace("_", " ")
        axes.plot(at, values, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(at[width - 1 :], smooth, color=color, label=f"{label}, mean of {width} steps")
        held = [(t, row[f"heldout_{name}"]) for t, row in zip(tokens, rows, strict=True)
                if f"heldout_{name}" in row]  # fmt: skip
        if held:
            axes.plot(*zip(*held, strict=True), "o--", color=color, label=f"{label}, held out")
    axes.set(xlabel="million tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_path(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def duration(seconds: float) -> str:
    """``seconds`` as people say it: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
