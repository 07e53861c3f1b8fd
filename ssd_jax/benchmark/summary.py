"""What follows from the records: every figure here can be recomputed from them and the costs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ssd_jax.benchmark.measure import SAMPLINGS, Record, is_sampled
from ssd_jax.plan import MODES, WIDE, prefill_passes

BASELINE = "baseline"  # further baselines are named after it, with a dtype
SAMPLED = ", sampled"  # ends the name of a mode's plan for sampled texts, where it is another one

Prompts = dict[int, list[Record]]  # the repeats of each prompt, in one mode and sampling
Costs = dict[str, dict[str, dict[str, Any]]]
Summary = dict[str, dict[str, dict[str, Any]]]


def summarize(records: Sequence[Record], costs: Costs | None = None) -> Summary:
    """``summary[sampling][mode]``, as this package's docstring defines it.

    Args:
      records: of any modes.
      costs: of passes alone; without them there is no ``overhead_share``.
    """
    summary: Summary = {}
    for sampling in dict.fromkeys(record["sampling"] for record in records):
        chosen = [record for record in records if record["sampling"] == sampling]
        modes = {
            mode: by_prompt(record for record in chosen if record["mode"] == mode)
            for mode in dict.fromkeys(record["mode"] for record in chosen)
        }
        summary[sampling] = {
            name: _summary_of(name, own, modes, of_kind(costs or {}, name, sampling))
            for name, own in modes.items()
        }
    return summary


def of_kind(known: Mapping[str, Any], mode: str, sampling: str) -> Any:
    """What is known of a mode (its plan, its costs) for a sampling; ``None`` if nothing is."""
    other = f"{mode}{SAMPLED}"
    # Records of other engines or schemas may name samplings of their own.
    sampled = sampling in SAMPLINGS and is_sampled(sampling)
    return known.get(other if sampled and other in known else mode)


def by_prompt(records: Iterable[Record]) -> Prompts:
    """The repeats of each prompt."""
    prompts: Prompts = {}
    for record in records:
        prompts.setdefault(record["prompt"], []).append(record)
    return prompts


def _summary_of(name: str, prompts: Prompts, modes: dict[str, Prompts], costs: dict | None) -> dict:
    firsts = [repeats[0] for repeats in prompts.values()]
    told = None not in [record["passes"].get("oracle") for record in firsts]
    passes = sum(record["passes"]["oracle"] for record in firsts) if told else None
    characters = [record["characters"] for record in firsts]
    margins = [record["min_margin"] for record in firsts if record["min_margin"] is not None]
    ratios = [_speedup(prompts, own) for mode, own in modes.items() if mode.startswith(BASELINE)]
    # Over the fastest baseline: no dtype of ours flatters another.
    known = [ratio for ratio in ratios if ratio[0] is not None]
    speedup, interval = min(known, default=(None, None))
    return {
        "tokens_per_second": _tokens_per_second(prompts),
        "speedup": speedup,
        "speedup_interval": interval,
        "tokens_per_oracle_pass": _ratio(sum(r["new_tokens"] for r in firsts), passes),
        "characters_per_oracle_pass": (
            None if None in characters else _ratio(sum(characters), passes)
        ),
        "relative_bandwidth": _weighted_mean(firsts, "relative_bandwidth"),
        "overhead_share": _overhead_share(firsts, costs) if costs else None,
        "acceptance_by_depth": _acceptance_by_depth(firsts),
        "repetitive_share": _ratio(sum(is_repetitive(r["tokens"]) for r in firsts), len(firsts)),
        "ended_share": _ratio(sum(r["finish_reason"] == "eos" for r in firsts), len(firsts)),
        "exact_match": _exact_match(name, prompts, modes.get(BASELINE)),
        "min_margin": min(margins, default=None),
    }


def _overhead_share(records: Sequence[Record], costs: dict) -> float | None:
    """See the package."""
    alone = 0.0
    for record in records:
        for stage, cost in costs.items():
            alone += _prefill_alone(record, cost) + _seconds_alone(record, stage, cost)
    total = sum(record["seconds"] for record in records)
    return 1 - alone / total if total else None


def _prefill_alone(record: Record, cost: dict) -> float:
    """Seconds of a stage's passes over the prompt."""
    wide, single = prefill_passes(record["prompt_tokens"] - 1, cost["prefill_width"])
    in_single = cost["prefill_seconds"]
    # Before there were wide passes, each took the place of its chunks.
    return wide * cost.get("wide_prefill_seconds", WIDE * in_single) + single * in_single


def _seconds_alone(record: Record, stage: str, cost: dict) -> float:
    """Of a stage's passes after the prompt's; the oracle's are of the width of their round."""
    narrower = cost.get("narrower")  # schema 2 has neither these nor the rounds' widths
    if not narrower:
        return record["passes"][stage] * cost["seconds"]
    rounds = zip(record["round_passes"][stage], record["round_widths"], strict=True)
    return sum(count * narrower.get(str(width), cost["seconds"]) for count, width in rounds)


def _acceptance_by_depth(records: Sequence[Record]) -> list[float] | None:
    """``[d - 1]``: the share of rounds that accept a drafted token at depth ``d``."""
    if any(record["round_tokens"] is None for record in records):
        return None
    rounds = [tokens for record in records for tokens in record["round_tokens"]]
    return [
        sum(tokens > depth for tokens in rounds) / len(rounds)
        for depth in range(1, max(rounds, default=0))
    ]


def speedups(prompts: Prompts, baseline: Prompts) -> dict[int, float]:
    """Of each prompt that both decoded (the paper's Figure 2): the ratio of tokens a second."""
    return {
        index: ratio
        for index in sorted(prompts.keys() & baseline.keys())
        if (ratio := _speedup({index: prompts[index]}, {index: baseline[index]})[0]) is not None
    }


def is_repetitive(tokens: Sequence[int], length: int = 8, times: int = 4) -> bool:
    """Whether some n-gram of ``length`` tokens occurs more than ``times`` times."""
    ngrams = (tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
    return max(Counter(ngrams).values(), default=0) > times


def _speedup(prompts: Prompts, baseline: Prompts) -> tuple[float | None, list[float] | None]:
    """Over the prompts that both modes decoded, with its bootstrap interval."""
    common = sorted(prompts.keys() & baseline.keys())
    totals = np.array(
        [[*_total(prompts[index]), *_total(baseline[index])] for index in common]
    ).reshape(-1, 4)
    if not totals[:, [1, 2]].sum(axis=0).all():
        return None, None

    def ratio(sums: np.ndarray) -> np.ndarray:
        tokens, seconds, base_tokens, base_seconds = np.moveaxis(sums, -1, 0)
        return tokens * base_seconds / np.maximum(seconds * base_tokens, 1e-12)

    picks = np.random.default_rng(0).integers(len(common), size=(1000, len(common)))
    low, high = np.percentile(ratio(totals[picks].sum(axis=1)), [2.5, 97.5])
    return float(ratio(totals.sum(axis=0))), [float(low), float(high)]


def _total(repeats: Sequence[Record]) -> tuple[int, float]:
    """New tokens and median seconds of a prompt."""
    return repeats[0]["new_tokens"], statistics.median(record["seconds"] for record in repeats)


def _exact_match(name: str, prompts: Prompts, baseline: Prompts | None) -> list[int] | None:
    firsts = [repeats[0] for repeats in (*prompts.values(), *(baseline or {}).values())]
    other_numerics = len({record["dtype"] for record in firsts}) > 1
    is_own = name.startswith(BASELINE) or name in MODES
    other_noise = not is_own and firsts[0]["sampling"] != "greedy"
    if baseline is None or other_numerics or other_noise:
        return None
    common = prompts.keys() & baseline.keys()
    same = sum(
        all(record["tokens"] == baseline[index][0]["tokens"] for record in prompts[index])
        for index in common
    )
    return [same, len(common)]


def _tokens_per_second(prompts: Prompts) -> float | None:
    totals = [_total(repeats) for repeats in prompts.values()]
    return _ratio(sum(tokens for tokens, _ in totals), sum(seconds for _, seconds in totals))


def _weighted_mean(records: list[Record], field: str) -> float | None:
    known = [record for record in records if record[field] is not None]
    weighted = sum(record[field] * record["new_tokens"] for record in known)
    return _ratio(weighted, sum(record["new_tokens"] for record in known))


def _ratio(numerator: float, denominator: float | None) -> float | None:
    return numerator / denominator if denominator else None


def own_first(modes: Record) -> list[tuple[str, Record]]:
    """Modes and their figures: our own in order, then other baselines, then peers."""

    def rank(item: tuple[str, Record]) -> int:
        mode = item[0]
        return MODES.index(mode) if mode in MODES else 3 if mode.startswith(BASELINE) else 4

    return sorted(modes.items(), key=rank)
