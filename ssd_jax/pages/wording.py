"""Figures, names and tokens as pages word them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


SAMPLING_LABELS = {"greedy": "greedy", "topk50": "top-k 50, T = 1"}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any, spec: str = ".2f") -> str:
    """A number with a true minus sign, or a dash for none."""
    if not is_number(value) or not math.isfinite(value):
        return MISSING
    return format(value, spec).replace("-", "\N{MINUS SIGN}")


def percent(value: Any) -> str:
    return f"{number(100 * value, '.0f')}\N{NO-BREAK SPACE}%" if is_number(value) else MISSING


def times(value: Any) -> str:
    return f"{number(value)}×" if is_number(value) else MISSING


def interval(pair: Any) -> str:
    """A 95 % interval; nothing if there is none, or if it is that of a ratio to itself."""
    if not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == pair[1]:
        return ""
    return f"{number(pair[0])}–{number(pair[1])}"


def cell(value: Any) -> str:
    """A cell of a table whose columns are not known beforehand."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ",.0f" if abs(value) >= 1000 else ".4g")
    if isinstance(value, int):
        return number(value, ",d")
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return MISSING if value is None else str(value)


def visible(token: str, longest: int | None = None) -> str:
    """A token's text with its white space and control characters to be seen."""
    shown = "".join(_SIGNS.get(c) or (chr(0x2400 + ord(c)) if c < " " else c) for c in token)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown or "∅"


_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\x7f": "␡"}


def sampling_label(name: str) -> str:
    return SAMPLING_LABELS.get(name, name)


def stage_class(stage: str) -> str:
    """The page's class for a stage: it has colours for two drafts, the second's serves more."""
    if stage in ("oracle", "draft", "ngram"):
        return stage
    return "draft2" if stage.startswith("draft") else "other"


def stage_label(stage: str) -> str:
    return {"ngram": "n-gram"}.get(stage, stage)


def count(value: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def bytes_(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{value:g}\N{NO-BREAK SPACE}B"


def flops(value: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}flop/s"
    return f"{value:.3g} flop/s"
