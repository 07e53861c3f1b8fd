"""Speed and exactness of the decoding modes over many prompts, recorded in ``results.json``.

Method: every prompt is decoded by all modes in turn, so that a disturbance of the machine hits
them alike; a run that had to compile is not recorded but repeated; seconds are those that the
engine reports, which end when the tokens are on the host.

``results.json`` (schema 1) holds ``conditions``; ``records``, one per prompt, mode, sampling
and repeat; and ``summary[sampling][mode]``, which is computed from the records alone:

  ``tokens_per_second``          new tokens over seconds, both summed over the prompts, the
                                 seconds of a prompt being the median of its repeats
  ``speedup``                    ``tokens_per_second`` over that of ``baseline``, both over
                                 the prompts that both modes decoded
  ``tokens_per_oracle_pass``     new tokens over oracle passes, both summed
  ``characters_per_oracle_pass`` characters over oracle passes, both summed; ``null`` where
                                 the stack has no tokenizer
  ``relative_bandwidth``         mean over the prompts, weighted by new tokens
  ``overhead_share``             ``null``: not measured yet
  ``repetitive_share``           share of the prompts whose text holds one 8-gram of tokens more
                                 than 4 times: a model that loops makes every speculator look
                                 good
  ``ended_share``                share of the prompts whose text ended itself, before the limit
  ``exact_match``                ``[same, of]``: prompts all of whose repeats hold the tokens of
                                 the baseline's first repeat

Figures that need the baseline are ``null`` where it was not run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax import cli
from ssd_jax.errors import DataError
from ssd_jax.files import atomic_path

if TYPE_CHECKING:
    from ssd_jax.generate import GenerationResult
    from ssd_jax.stack import Stack

SCHEMA = 1
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "topk50": {"temperature": 1.0, "top_k": 50},
}
VERSIONED = ("ssd-jax", "jax", "jaxlib", "flax", "numpy")

Record = dict[str, Any]
Prompts = dict[int, list[Record]]  # the repeats of each prompt, in one mode and sampling


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The ``prompt`` fields of a JSON-lines file, plain or gzipped (name ends in ``.gz``).

    Raises:
      DataError: a line is not an object with a string ``prompt``, or there is none at all.
      OSError: the file cannot be opened.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    prompts = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt_of(line, f"{path}, line {number}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); give UTF-8 JSON lines or .gz") from None
    if not prompts:
        raise DataError(f"{path} holds no prompt; give JSON lines with a field 'prompt'")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f"{where}: expected a JSON object with a string field 'prompt'")
    return prompt


def run(
    generate: Callable[..., GenerationResult],
    prompts: Sequence[str],
    *,
    modes: Sequence[str],
    samplings: Sequence[str],
    repeats: int,
    seed: int = 0,
) -> Iterator[Record]:
    """Measure, yielding each record as soon as it is there.

    Args:
      generate: called as ``generate(prompt, mode=..., seed=..., **sampling options)``.
      prompts: prompt ``i`` is decoded with seed ``seed + i``.
      modes: of ``cli.MODES``; they take turns within every repeat of every prompt.
      samplings: keys of ``SAMPLINGS``.
      repeats: recorded runs of each combination.
      seed: the first prompt's.
    """
    for index, prompt in enumerate(prompts):
        for sampling in samplings:
            for repeat in range(repeats):
                for mode in modes:
                    options = {"mode": mode, "seed": seed + index, **SAMPLINGS[sampling]}
                    result = generate(prompt, **options)
                    compile_seconds = float(result.stats.compile_seconds)
                    if compile_seconds > 0:
                        result = generate(prompt, **options)
                    yield {
                        "prompt": index,
                        "mode": mode,
                        "sampling": sampling,
                        "repeat": repeat,
                        "compile_seconds": compile_seconds,
                        **_measured(result),
                    }


def _measured(result: GenerationResult) -> Record:
    stats = result.stats
    return {
        "seconds": float(stats.seconds),
        "new_tokens": int(stats.new_tokens),
        "characters": len(result.text) if isinstance(result.text, str) else None,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "rounds": int(stats.rounds),
        "passes": {stage: int(count) for stage, count in stats.passes.items()},
        "relative_bandwidth": cli.finite(stats.relative_bandwidth),
        "min_margin": cli.finite(stats.min_margin),
    }


def summarize(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """``summary[sampling][mode]`` as this module's docstring defines it."""
    summary: dict[str, dict[str, Record]] = {}
    for sampling in dict.fromkeys(record["sampling"] for record in records):
        chosen = [record for record in records if record["sampling"] == sampling]
        modes = {
            mode: _by_prompt(record for record in chosen if record["mode"] == mode)
            for mode in dict.fromkeys(record["mode"] for record in chosen)
        }
        baseline = modes.get("baseline")
        summary[sampling] = {name: _summary_of(own, baseline) for name, own in modes.items()}
    return summary


def _by_prompt(records: Iterable[Record]) -> Prompts:
    prompts: Prompts = {}
    for record in records:
        prompts.setdefault(record["prompt"], []).append(record)
    return prompts


def _summary_of(prompts: Prompts, baseline: Prompts | None) -> Record:
    firsts = [repeats[0] for repeats in prompts.values()]
    oracle_passes = sum(record["passes"]["oracle"] for record in firsts)
    characters = [record["characters"] for record in firsts]
    return {
        "tokens_per_second": _tokens_per_second(prompts),
        "speedup": _speedup(prompts, baseline) if baseline else None,
        "tokens_per_oracle_pass": _ratio(sum(r["new_tokens"] for r in firsts), oracle_passes),
        "characters_per_oracle_pass": (
            None if None in characters else _ratio(sum(characters), oracle_passes)
        ),
        "relative_bandwidth": _weighted_mean(firsts, "relative_bandwidth"),
        "overhead_share": None,
        "repetitive_share": _ratio(sum(is_repetitive(r["tokens"]) for r in firsts), len(firsts)),
        "ended_share": _ratio(sum(r["finish_reason"] == "eos" for r in firsts), len(firsts)),
        "exact_match": _exact_match(prompts, baseline) if baseline else None,
    }


def is_repetitive(tokens: Sequence[int], length: int = 8, times: int = 4) -> bool:
    """Whether some n-gram of ``length`` tokens occurs more than ``times`` times."""
    ngrams = (tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
    return max(Counter(ngrams).values(), default=0) > times


def _speedup(prompts: Prompts, baseline: Prompts) -> float | None:
    """Over the prompts that both modes decoded: an interrupted run ends between the two."""
    common = prompts.keys() & baseline.keys()
    own, reference = (
        _tokens_per_second({index: side[index] for index in common}) for side in (prompts, baseline)
    )
    return _ratio(own, reference)


def _exact_match(prompts: Prompts, baseline: Prompts) -> list[int]:
    common = prompts.keys() & baseline.keys()
    same = sum(
        all(record["tokens"] == baseline[index][0]["tokens"] for record in prompts[index])
        for index in common
    )
    return [same, len(common)]


def _tokens_per_second(prompts: Prompts) -> float | None:
    tokens = sum(repeats[0]["new_tokens"] for repeats in prompts.values())
    seconds = sum(statistics.median(r["seconds"] for r in repeats) for repeats in prompts.values())
    return _ratio(tokens, seconds)


def _weighted_mean(records: list[Record], field: str) -> float | None:
    known = [record for record in records if record[field] is not None]
    weighted = sum(record[field] * record["new_tokens"] for record in known)
    return _ratio(weighted, sum(record["new_tokens"] for record in known))


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def conditions(args: argparse.Namespace, stack: Stack) -> Record:
    """What a reader must know to judge the figures: device, versions, models, options."""
    import jax

    from ssd_jax import checkpoint
    from ssd_jax.gpt2 import parameter_count

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": device.platform,
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONED},
        "commit": _commit(),
        "models": {
            name: Path(value).name if value else None
            for name, value in (
                ("checkpoint", None if args.oracle else args.checkpoint or "python-small"),
                ("oracle", args.oracle),
                ("ngram", args.ngram),
                ("plan", args.plan),
            )
        }
        | {"drafts": [Path(draft).name for draft in args.draft]},
        "parameters": {
            name: parameter_count(model)
            for name, model in zip(stack.stage_names, (stack.oracle, *stack.drafts), strict=False)
        },
        "label": checkpoint.load_label(args.oracle) if args.oracle else None,
        "dtype": str(stack.oracle.dtype),
        "prompts": Path(args.prompts).name,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "seed": args.seed,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, with ``-dirty`` if it was edited; ``None`` outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_results(folder: str | Path, document: Record) -> Path:
    """Write ``results.json`` in ``folder`` (made if need be); the file is never half there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False, indent=1), encoding="utf-8")
    return path


def summary_table(summary: dict[str, dict[str, Record]]):
    """A rich table, one row per sampling and mode."""
    from rich.table import Table

    columns = {
        "tokens/s": ("tokens_per_second", "{:.1f}"),
        "speed-up": ("speedup", "{:.2f}x"),
        "tokens per oracle pass": ("tokens_per_oracle_pass", "{:.2f}"),
        "relative bandwidth": ("relative_bandwidth", "{:.2f}"),
    }
    table = Table()
    table.add_column("sampling")
    table.add_column("mode")
    for heading in (*columns, "identical"):
        table.add_column(heading, justify="right")
    for sampling, modes in summary.items():
        for mode, figures in modes.items():
            cells = [
                "-" if figures[field] is None else form.format(figures[field])
                for field, form in columns.values()
            ]
            match = figures["exact_match"]
            table.add_row(
                sampling, mode, *cells, "-" if match is None else f"{match[0]}/{match[1]}"
            )
    return table


def remarks(document: Record) -> list[str]:
    """What the reader of the table must know of models and texts, in sentences."""
    lines = []
    parameters = document["conditions"]["parameters"]
    for name, count in list(parameters.items())[1:]:
        lines.append(
            f"The oracle has {parameters['oracle'] / count:.1f} times {name}'s parameters."
        )
    if document["conditions"]["label"]:
        lines.append(f"The oracle is {document['conditions']['label']}.")
    for sampling, modes in document["summary"].items():
        mode, figures = next(iter(modes.items()))
        characters = [
            f"{name} {own['characters_per_oracle_pass']:.1f}"
            for name, own in modes.items()
            if own["characters_per_oracle_pass"] is not None
        ]
        lines.append(
            f"{sampling}: {figures['repetitive_share']:.0%} of the {mode} texts repeat an 8-gram "
            f"more than 4 times, {figures['ended_share']:.0%} end by themselves; characters per "
            f"oracle pass: {', '.join(characters) or 'unknown'}."
        )
    return lines


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that lists some of ``known``, separated by commas."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; choose of {','.join(known)}")
        return names

    return parse


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="benchmark.py",
        description="Measure speed and exactness of the decoding modes over a file of prompts.",
        epilog="example:\n  benchmark.py --prompts prompts.jsonl.gz --limit 20 --out runs/small\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="JSON lines with a field 'prompt', plain or .gz",
    )
    parser.add_argument("--limit", metavar="N", type=cli.positive_int, help="first N prompts only")
    parser.add_argument("--max-new-tokens", metavar="N", type=cli.positive_int, default=128)
    parser.add_argument(
        "--modes",
        metavar="A,B",
        type=_names(cli.MODES),
        default=list(cli.MODES),
        help="default: all",
    )
    parser.add_argument(
        "--sampling",
        metavar="A,B",
        type=_names(tuple(SAMPLINGS)),
        default=["greedy"],
        help=f"of {','.join(SAMPLINGS)}; default: greedy",
    )
    parser.add_argument("--repeats", metavar="N", type=cli.positive_int, default=1)
    parser.add_argument("--seed", metavar="S", type=cli.seed, default=0)
    parser.add_argument("--out", metavar="DIR", help="folder for results.json")
    cli.add_stack_arguments(parser)
    return parser


def _benchmark(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts, args.limit)
    stack, plan = cli.load_stack(args)
    args.modes = args.modes or cli.modes_of(stack)
    import ssd_jax

    def generate(prompt: str, *, mode: str, **options) -> GenerationResult:
        return ssd_jax.generate(
            stack,
            prompt,
            max_new_tokens=args.max_new_tokens,
            mode=mode,
            plan=plan if mode == "staged" else None,
            **options,
        )

    document: Record = {"schema": SCHEMA, "conditions": conditions(args, stack), "records": []}
    try:
        _collect(generate, prompts, args, document["records"])
    finally:  # an interrupted run keeps what it measured
        if document["records"]:
            _report(document, args.out)


def _collect(generate, prompts: list[str], args: argparse.Namespace, records: list[Record]) -> None:
    """Fill ``records``, showing progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    total = len(prompts) * len(args.sampling) * args.repeats * len(args.modes)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        for record in run(
            generate,
            prompts,
            modes=args.modes,
            samplings=args.sampling,
            repeats=args.repeats,
            seed=args.seed,
        ):
            records.append(record)
            progress.advance(task)


def _report(document: Record, out: str | None) -> None:
    from rich.console import Console

    document["summary"] = summarize(document["records"])
    Console().print(summary_table(document["summary"]))
    for line in remarks(document):
        print(line)
    if out is not None:
        print(f"results in {write_results(out, document)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``scripts/benchmark.py``; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    cli.check_stack_arguments(parser, args)
    return cli.run_command(lambda: _benchmark(args))
