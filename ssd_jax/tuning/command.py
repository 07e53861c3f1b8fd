"""The command line of the tuner."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax import cli
from ssd_jax.benchmark.prompts import HELDOUT, HUMANEVAL, load_prompts
from ssd_jax.files import atomic_path, write_json
from ssd_jax.tuned import KINDS, conditions
from ssd_jax.tuning.cost import TERMS
from ssd_jax.tuning.tuner import Progress, Tuning, tune

if TYPE_CHECKING:
    from rich.table import Table

    from ssd_jax.plan import Plan
    from ssd_jax.stack import Stack
    from ssd_jax.tuning.tuner import TableRow

EXAMPLES = """\
examples:
  tune.py
  tune.py --oracle gpt2-large --draft distilgpt2 --prompts mine.jsonl --limit 8
  tune.py --kinds greedy --search-seconds 300 --confirm 6 --out tuning.json
  tune.py --max-new-tokens 32 --limit 4 --dry-run

Ctrl-C ends it early and keeps the best plan so far. Decoding and the benchmark follow the plan
from then on; --verbose of decoding shows it, --plan default leaves it out.
"""


def build_parser(prog: str = "tune.py") -> cli.Parser:
    parser = cli.Parser(
        prog=prog,
        description="Find the fastest speculation plans for this device and these models, greedy "
        "and sampled, and keep them for decoding. Takes some minutes, most of them compiling. The "
        "text that is written never depends on the plan.",
        epilog=EXAMPLES.replace("tune.py", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        default=HELDOUT,
        help=f"to calibrate on: a file of JSON lines with a field 'prompt', plain or .gz; "
        f"{HUMANEVAL!r}; default: {HELDOUT!r}, functions of the standard library",
    )
    parser.add_argument(
        "--limit", metavar="N", type=cli.positive_int, default=8, help="prompts; default: 8"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=cli.positive_int, default=64, help="default: 64"
    )
    parser.add_argument(
        "--kinds", choices=(*KINDS, "both"), default="both", help="of decoding; default: both"
    )
    parser.add_argument("--temperature", metavar="T", type=cli.temperature, default=1.0)
    parser.add_argument("--top-k", metavar="K", type=cli.top_k, default=50)
    parser.add_argument("--top-p", metavar="P", type=cli.top_p)
    parser.add_argument("--seed", metavar="S", type=cli.seed, default=0)
    parser.add_argument(
        "--max-width",
        metavar="W",
        type=cli.positive_int,
        default=48,
        help="widest pass of the oracle that is considered; default: 48",
    )
    parser.add_argument(
        "--search-seconds", metavar="S", type=float, default=60.0, help="a kind; default: 60"
    )
    parser.add_argument(
        "--confirm",
        metavar="N",
        type=cli.positive_int,
        default=3,
        help="run the N plans with the best predictions; default: 3",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=cli.positive_int, default=3, help="of every run; default: 3"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write all of it as JSON")
    parser.add_argument("--dry-run", action="store_true", help="do not keep the plans")
    cli.add_stack_arguments(parser, plan=False)
    return parser


def _tune(args: argparse.Namespace) -> None:
    prompts = load_prompts(args.prompts, args.limit)
    stack, _ = cli.load_stack(args)
    with _progress() as on_progress:
        found = tune(
            stack,
            prompts,
            max_new_tokens=args.max_new_tokens,
            kinds=KINDS if args.kinds == "both" else (args.kinds,),
            sampling={"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p},
            max_width=args.max_width,
            search_seconds=args.search_seconds,
            confirm=args.confirm,
            repeats=args.repeats,
            seed=args.seed,
            save=not args.dry_run,
            on_progress=on_progress,
        )
    _print(found)
    if args.out:
        with atomic_path(args.out) as temporary:
            write_json(temporary, as_json(found, stack) | {"options": _options(args)})
        print(f"written to {args.out}")
    if found.interrupted:
        raise KeyboardInterrupt


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, in JSON's types; of paths, the last part."""
    options = {name: value for name, value in vars(args).items() if name != "out"}
    for name in ("checkpoint", "oracle", "ngram", "tokenizer", "prompts"):
        options[name] = options[name] and Path(options[name]).name
    return options | {"draft": [Path(draft).name for draft in args.draft]}


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, with an estimate of the time that is left to each step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def show(what: str, share: float) -> None:
            if share < bar.tasks[0].completed:  # another step begins
                bar.reset(task)
            bar.update(task, description=what, completed=share)

        yield show


def _print(found: Tuning) -> None:
    from rich.console import Console

    console = Console()
    for kind, rows in found.rows.items():
        console.print(table(kind, rows))
        for row in rows:
            console.print(f"{row.name}: {describe(row.plan)}", highlight=False, soft_wrap=True)
        console.print(f"{found.searched[kind]} trees replayed", highlight=False)
    if not found.rows:
        console.print("interrupted before anything was found; no plan was kept")
    elif found.path:
        console.print(f"plans kept in {found.path}", highlight=False, soft_wrap=True)


def table(kind: str, rows: Sequence[TableRow]) -> Table:
    """Predicted against measured; the plan that was kept has a star."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=kind, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    made.add_column("plan", no_wrap=True)
    headings = ("speed-up", "predicted", "tokens/pass", "predicted", "coverage")
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(f"{row.name}{' *' * row.kept}", *_cells(row))
    return made


def _cells(row: TableRow) -> list[str]:
    values = (
        (row.speedup, "{:.2f}x"),
        (row.predicted_speedup, "{:.2f}x"),
        (row.tokens_per_pass, "{:.2f}"),
        (row.predicted_tokens_per_pass, "{:.2f}"),
        (row.coverage, "{:.0%}"),
    )
    return ["-" if value is None else form.format(value) for value, form in values]


def describe(plan: Plan) -> str:
    """A plan in a line: the oracle's width, nodes and depth; then each stage."""
    parts = ["width " + " or ".join(map(str, (*plan.narrower, plan.width)))]
    if plan.drafts or plan.ngram:
        parts[0] += f" of {plan.nodes}, depth {plan.depth}"
    if plan.row_cost:
        parts[0] += f", a row {plan.row_cost:.2g}"
    for d in plan.drafts:
        cost = f" cost {d.cost:.2g}" if d.cost else ""
        parts.append(f"draft r{d.rounds} w{d.width} b{d.branch} th {d.threshold:g}{cost}")
    if (ngram := plan.ngram) is not None:
        parts.append(f"n-gram l{ngram.levels} w{ngram.width} b{ngram.branch} m{ngram.match}")
    return "; ".join(parts)


def as_json(found: Tuning, stack: Stack) -> dict[str, Any]:
    """All that a run found, in JSON's types."""
    return {
        "conditions": conditions(stack),
        "costs": dataclasses.asdict(found.tuned.costs),
        "factors": {
            kind: dict(zip(TERMS, own, strict=False)) for kind, own in found.factors.items()
        },
        "searched": found.searched,
        "plans": {
            kind: [
                dataclasses.asdict(row) | {"plan": json.loads(row.plan.to_json())} for row in rows
            ]
            for kind, rows in found.rows.items()
        },
        "interrupted": found.interrupted,
    }


def main(argv: Sequence[str] | None = None, prog: str = "tune.py") -> int:
    """Entry point of ``scripts/tune.py``; returns the exit status."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    cli.check_stack_arguments(parser, args)
    if not args.temperature:
        parser.error("--temperature is of sampled decoding, and 0 is greedy; give more than 0")
    if not args.search_seconds >= 0:
        parser.error("--search-seconds must not be negative")
    return cli.run_command(lambda: _tune(args))
