"""``report.html``: the benchmark's figures, plots, texts and trees in one file to look at.

One of :mod:`ssd_jax.pages`.
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssd_jax import pages
from ssd_jax.benchmark.drawing import acceptance_plots, roofline_plot, swarm_plots
from ssd_jax.benchmark.summary import BASELINE, own_first
from ssd_jax.files import atomic_path
from ssd_jax.pages import shares, stage_rank
from ssd_jax.pages.trees import drawn_rounds
from ssd_jax.pages.wording import (
    MISSING,
    bytes_,
    cell,
    count,
    interval,
    number,
    percent,
    sampling_label,
    times,
)
from ssd_jax.plan import MODES, WIDE

NAME = "report.html"

MODE_WORDS = {
    "baseline": "plain decoding, one oracle pass a token",
    "speculative": "classical speculation, a chain of the first draft's guesses",
    "staged": "the paper's: a tree that all stages grow",
    "hf": "transformers, plain generate",
    "hf-assisted": "transformers, assisted by the same draft",
    "hf-lookup": "transformers, guesses looked up in the text so far",
    "ctranslate2": "CTranslate2, plain decoding",
}

# Spector and Ré (2023), HumanEval's 164 prompts: Table 1, Table 2, parameters.
PAPER_BANDWIDTH = {"greedy": (1.00, 0.31, 0.23), "topk50": (1.00, 0.48, 0.35)}
PAPER_SPEED = {"greedy": (150.0, 350.0, 475.0), "topk50": (150.0, 219.0, 298.0)}
PAPER_SPEEDUP = {"greedy": (1.0, 2.33, 3.16), "topk50": (1.0, 1.46, 1.98)}
PAPER_PARAMETERS = 762e6

Record = dict[str, Any]


def write(folder: Path, document: dict) -> Path:
    """Write ``report.html`` in ``folder`` (made if need be), never half there.

    Args:
      folder: where.
      document: as in ``results.json``; sections and fields may be missing. Shown beyond those:
        ``roofline``, of ``bandwidth`` (bytes/s), ``flops`` (flop/s) and ``points``, each with
        ``name``, ``intensity`` (flop/byte) and ``flops`` (achieved, flop/s); and ``ablations``,
        lists of rows by name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = render(document)
    with atomic_path(folder / NAME) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # of lone surrogates
    return folder / NAME


def render(document: dict) -> str:
    """The page; see :func:`write`."""
    summary: Record = document.get("summary") or {}
    conditions: Record = document.get("conditions") or {}
    examples: list[Record] = document.get("examples") or []
    return pages.render(
        "report.html.j2",
        headline=headline(document),
        verdict=verdict(summary),
        conditions=condition_rows(document),
        busy=(conditions.get("load_average") or 0) > (conditions.get("cpu_count") or math.inf),
        summary={sampling: own_first(modes) for sampling, modes in summary.items()},
        mode_words=_mode_words(summary, document.get("peers") or {}),
        plans={mode: cell(plan) for mode, plan in (conditions.get("plans") or {}).items()},
        costs=document.get("costs") or {},
        wide=WIDE,
        overheads=[
            f"{percent(share)} ({sampling_label(sampling)})"
            for sampling, modes in summary.items()
            if (share := (modes.get("staged") or {}).get("overhead_share")) is not None
        ],
        paper=paper_tables(summary),
        models_here=_models(conditions),
        device=_device(conditions),
        dtype=conditions.get("dtype"),
        prompts=_prompts(conditions),
        paper_ratio=_ratio_to_paper(conditions),
        roofline=roofline_plot(document.get("roofline")),
        swarms=swarm_plots(document),
        curves=acceptance_plots(summary),
        origin_shares=origin_shares(document),
        texts=[_text(example) for example in examples],
        stages=_stages(examples),
        viewers=[viewer for example in examples if (viewer := _viewer(example))["rounds"]],
        ablations=_ablations(document.get("ablations") or {}),
        command=command(conditions, summary),
    )


def headline(document: dict) -> str:
    """The key figures in one sentence."""
    summary: Record = document.get("summary") or {}
    modes = [mode for mode in MODES if any(mode in own for own in summary.values())]
    if not modes:
        return "Nothing was measured."
    mode = modes[-1]
    parts = []
    for sampling, own in summary.items():
        figures = own.get(mode) or {}
        said = [
            (figures.get("tokens_per_oracle_pass"), "{:.2f} tokens per oracle pass"),
            (figures.get("relative_bandwidth"), "{:.2f} of plain decoding’s bytes per token"),
            (figures.get("tokens_per_second"), "{:.0f} tokens/s"),
        ]
        clauses = [words.format(value) for value, words in said if value is not None]
        if mode != BASELINE and figures.get("speedup") is not None:
            known = interval(figures.get("speedup_interval"))
            clauses.append(
                f"{times(figures['speedup'])} the speed of the fastest plain decoding"
                + (f" (95\N{NO-BREAK SPACE}% interval {known})" if known else "")
            )
        if clauses:
            parts.append(f"{sampling_label(sampling)}: {', '.join(clauses)}")
    conditions: Record = document.get("conditions") or {}
    where = ", ".join(part for part in (_device(conditions), conditions.get("dtype")) if part)
    name = "Plain" if mode == BASELINE else mode.capitalize()
    return f"{name} decoding{f' on {where}' if where else ''} – {'; '.join(parts)}."


def verdict(summary: Record) -> Record | None:
    """Whether the drafting modes wrote the baseline's texts: ``same`` of ``of``."""
    matches = [
        match
        for modes in summary.values()
        for mode, figures in modes.items()
        if mode in MODES and mode != BASELINE and (match := figures.get("exact_match"))
    ]
    of = sum(match[1] for match in matches)
    return {"same": sum(match[0] for match in matches), "of": of} if of else None


def condition_rows(document: dict) -> list[tuple[str, str]]:
    """Under what conditions it was measured, as names and words."""
    rest = dict(document.get("conditions") or {})
    c = {name: rest.pop(name, None) for name in _TOLD}
    rows = [("date", _date(c["date"])), ("device", _device(c))]
    system = [
        c["backend"] and f"backend {c['backend']}",
        c["machine"],
        c["frequency_governor"] and f"governor {c['frequency_governor']}",
        c["load_average"] is not None and f"load {c['load_average']} at the start",
    ]
    rows.append(("system", ", ".join(part for part in system if part)))
    if document.get("peak_memory_bytes"):
        rows.append(("peak memory", bytes_(document["peak_memory_bytes"])))
    rows += [("models", _models(c)), ("a pass reads", _pass_bytes(c)), ("dtype", _dtype(c))]
    rows.append(("prompts", _prompts(c)))
    decoding = [
        c["max_new_tokens"] and f"at most {c['max_new_tokens']} new tokens",
        c["repeats"] and f"{c['repeats']} run{'s' * (c['repeats'] != 1)} of each",
        c["seed"] is not None and f"seed {c['seed']}",
    ]
    rows.append(("decoding", ", ".join(part for part in decoding if part)))
    versions = {"python": c["python"], **(c["versions"] or {})}
    rows.append(("versions", ", ".join(f"{n} {v}" for n, v in versions.items() if v)))
    rows.append(("commit", _commit(c["commit"])))
    rows += [(name.replace("_", " "), cell(value)) for name, value in rest.items()]
    return [(name, words) for name, words in rows if words and words != MISSING]


# The conditions that `condition_rows` words; it lists what else there is as it is.
_TOLD = (
    *("date", "device", "backend", "cpu_count", "frequency_governor", "load_average", "machine"),
    *("python", "versions", "commit", "stages", "dtype", "exact", "parameters"),
    *(
        "weight_bytes",
        "cache_bytes_per_token",
        "plans",
        "models",
        "label",
        "prompts",
        "limit",
        "prompt_count",
    ),
    *("max_new_tokens", "repeats", "seed"),
)


def _dtype(conditions: Record) -> str:
    exact = ", exact" if conditions.get("exact") else ""
    return f"{conditions.get('dtype') or MISSING}{exact}"


def _date(text: str | None) -> str:
    try:
        moment = datetime.datetime.fromisoformat(text or "")
    except ValueError:
        return text or ""
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _device(conditions: Record) -> str:
    cores = conditions.get("cpu_count")
    device = conditions.get("device")
    if not device or not cores:
        return device or ""
    return f"{device}, {cores} {'host ' * (conditions.get('backend') != 'cpu')}" + (
        "core" if cores == 1 else "cores"
    )


def _models(conditions: Record) -> str:
    """The models with their sizes, and how many times the oracle's each one is smaller."""
    parameters = conditions.get("parameters") or {}
    oracle = parameters.get("oracle")
    parts = [
        f"{name} {count(size)} parameters"
        + (f" ({oracle / size:.1f} times fewer)" if oracle and name != "oracle" and size else "")
        for name, size in parameters.items()
    ]
    ngrams = [plan.get("ngram") or {} for plan in (conditions.get("plans") or {}).values()]
    parts += ["Katz trigram"] * any(ngram.get("branch") for ngram in ngrams)
    parts += ["look-up in the text"] * any(ngram.get("match") for ngram in ngrams)
    models = conditions.get("models") or {}
    names = [models.get("checkpoint") or models.get("oracle"), conditions.get("label")]
    name = ", ".join(str(name) for name in names if name)
    return f"{name} – {', '.join(parts)}" if name and parts else name or ", ".join(parts)


def _pass_bytes(conditions: Record) -> str:
    cache = conditions.get("cache_bytes_per_token") or {}
    return "; ".join(
        f"{name} {bytes_(size)}"
        + (f" and {bytes_(cache[name])} for each token so far" if name in cache else "")
        for name, size in (conditions.get("weight_bytes") or {}).items()
    )


def _prompts(conditions: Record) -> str:
    count, name = conditions.get("prompt_count"), conditions.get("prompts")
    parts = [name, count and f"{count} prompt{'s' * (count != 1)}"]
    return ", ".join(str(part) for part in parts if part)


def _commit(text: str | None) -> str:
    commit, dirty, _ = (text or "").partition("-dirty")
    return commit[:12] + (", edited" if dirty else "")


def _ratio_to_paper(conditions: Record) -> str | None:
    oracle = (conditions.get("parameters") or {}).get("oracle")
    return f"{PAPER_PARAMETERS / oracle:.2g}" if oracle else None


def _mode_words(summary: Record, peers: Record) -> dict[str, str]:
    """What each mode is; of a peer, in which setting it is the fastest and which ones failed."""
    names = dict.fromkeys(mode for modes in summary.values() for mode, _ in own_first(modes))
    words = {}
    for mode in names:
        other = mode.removeprefix(f"{BASELINE}-")
        said = [f"plain decoding in {other}" if other != mode else MODE_WORDS.get(mode, "")]
        peer = peers.get(mode) or {}
        if peer.get("setting"):
            said.append(f"setting: {peer['setting']}")
        for setting, reason in (peer.get("skipped") or {}).items():
            said.append(f"failed: {setting} ({reason})")
        words[mode] = "; ".join(part for part in said if part)
    return words


def paper_tables(summary: Record) -> list[Record]:
    """The paper's Tables 1 and 2, each row with ours below it."""

    def ours(sampling: str, shown: Callable[[Record], str]) -> list[str]:
        modes = summary.get(sampling) or {}
        return [shown(modes.get(mode) or {}) for mode in MODES]

    def bandwidth(figures: Record) -> str:
        return number(figures.get("relative_bandwidth"))

    def speed(figures: Record) -> str:
        rate, ratio = figures.get("tokens_per_second"), figures.get("speedup")
        return number(rate, ".0f") + (f" ({times(ratio)})" if ratio is not None else "")

    return [
        {
            "title": "Table 1: relative bandwidth",
            "rows": [
                (sampling, [number(value) for value in values], ours(sampling, bandwidth))
                for sampling, values in PAPER_BANDWIDTH.items()
            ],
        },
        {
            "title": "Table 2: tokens/s (speed-up)",
            "rows": [
                (
                    sampling,
                    [
                        f"{number(rate, '.0f')} ({times(ratio)})"
                        for rate, ratio in zip(rates, PAPER_SPEEDUP[sampling], strict=True)
                    ],
                    ours(sampling, speed),
                )
                for sampling, rates in PAPER_SPEED.items()
            ],
        },
    ]


def command(conditions: Record, summary: Record) -> str:
    """What measures this again, as far as the conditions tell."""
    models = conditions.get("models") or {}
    plans = [name for name in conditions.get("plans") or {} if name in MODES]
    words = ["python", "scripts/benchmark.py"]

    def option(name: str, value: Any) -> None:
        if value not in (None, ""):
            words.extend((name, shlex.quote(str(value))))

    option("--prompts", conditions.get("prompts"))
    option("--limit", conditions.get("limit"))
    option("--sampling", ",".join(summary))
    option("--max-new-tokens", conditions.get("max_new_tokens"))
    option("--repeats", conditions.get("repeats"))
    option("--seed", conditions.get("seed"))
    if plans and set(plans) != set(MODES):
        option("--modes", ",".join(plans))
    measured = dict.fromkeys(mode for modes in summary.values() for mode in modes)
    option("--peers", ",".join(m for m in measured if m not in MODES and BASELINE not in m))
    if BASELINE in measured and not any(mode.startswith(f"{BASELINE}-") for mode in measured):
        words.append("--no-other-baseline")
    checkpoint = models.get("checkpoint")
    option("--checkpoint", checkpoint and f"checkpoints/{checkpoint}")
    option("--oracle", models.get("oracle"))
    for draft in models.get("drafts") or []:
        option("--draft", draft)
    option("--ngram", models.get("ngram"))
    option("--dtype", conditions.get("dtype"))
    if conditions.get("exact"):
        words.append("--exact")
    option("--out", "results")
    return " ".join(words)


def _ablations(tables: Mapping[str, Sequence[Record]]) -> dict[str, Record]:
    """Each table's columns, in the order in which its rows bring them, and rows of cells."""
    laid = {}
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [_column([row.get(column) for row in rows]) for column in columns]
        heads = [
            (column.replace("_", " "), "left" if ("left" in {kind for _, kind in own}) else "")
            for column, own in zip(columns, cells, strict=True)
        ]
        if rows:
            laid[name.replace("_", " ")] = {"heads": heads, "rows": list(zip(*cells, strict=True))}
    return laid


def _column(values: Sequence[Any]) -> list[tuple[str, str]]:
    """Cells and their classes: words to the left, numbers with as many decimals each."""
    largest = max((abs(v) for v in values if isinstance(v, float)), default=0.0)
    decimals = 4 if 0 < largest < 0.1 else 2 if largest < 100 else 0
    words = any(isinstance(v, str) and not _MATCH.fullmatch(v) for v in values)
    cells = []
    for value in values:
        shown = number(value, f",.{decimals}f") if isinstance(value, float) else cell(value)
        same = _MATCH.fullmatch(shown)
        fails = same is not None and same[1] != same[2]
        cells.append((f"✗ {shown}" if fails else shown, "bad" if fails else "left" * words))
    return cells


_MATCH = re.compile(r"(\d+) of (\d+)")


# --- Texts and trees ---------------------------------------------------------------------


def _stages(examples: Sequence[Record]) -> list[str]:
    """Those that the examples show."""
    pieces = {stage for example in examples for _, stage in example.get("pieces") or []}
    trees = [tree for example in examples for tree in example.get("trees") or []]
    return sorted(pieces | {node["stage"] for tree in trees for node in tree}, key=stage_rank)


def origin_shares(document: dict) -> list[Record]:
    """Over all texts, the share of the tokens that each stage proposed."""
    stages = (document.get("conditions") or {}).get("stages") or []
    found: dict[tuple[str, str], str] = {}
    for record in document.get("records") or []:
        if record["mode"] in MODES[1:] and record["repeat"] == 0 and record["origins"]:
            key = record["sampling"], record["mode"]
            found[key] = found.get(key, "") + record["origins"]
    return [
        {
            "sampling": sampling,
            "mode": mode,
            "tokens": len(origins),
            "shares": shares(stages[int(index)] for index in origins),
        }
        for (sampling, mode), origins in found.items()
        if max(map(int, set(origins))) < len(stages)
    ]


def _text(example: Record) -> Record:
    pieces = example.get("pieces") or []
    return {
        "title": _title(example),
        "rate": example.get("tokens_per_oracle_pass"),
        "prompt": example.get("prompt") or "",
        "pieces": pieces,
        "shares": shares(stage for _, stage in pieces),
    }


def _title(example: Record) -> str:
    sampling = sampling_label(example.get("sampling", MISSING))
    return f"Prompt {example.get('prompt_index', MISSING)}, {sampling}"


def _viewer(example: Record) -> Record:
    """An example's rounds, each drawn."""
    rounds = drawn_rounds(example.get("trees") or [], example.get("pieces") or [])
    return {"title": _title(example), "rounds": rounds}
