"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_jax import cli, shipped
from ssd_jax.benchmark import measure, results
from ssd_jax.benchmark.measure import SAMPLINGS, Record, Runner
from ssd_jax.benchmark.peers import PEERS
from ssd_jax.benchmark.prompts import HELDOUT, HUMANEVAL, load_prompts
from ssd_jax.benchmark.summary import BASELINE, SAMPLED, Costs, of_kind, summarize
from ssd_jax.benchmark.tables import remarks, summary_tables

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult
    from ssd_jax.benchmark.peers import Peer
    from ssd_jax.plan import Plan
    from ssd_jax.stack import Stack

DTYPES = ("float32", "bfloat16")
EXAMPLES, EXAMPLE_ROUNDS = 3, 6  # prompts in the report, and the rounds whose trees it draws
_SAVE_SECONDS = 30.0


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that lists some of ``known``, separated by commas."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; choose of {','.join(known)}")
        return names

    return parse


def build_parser(prog: str = "benchmark.py") -> cli.Parser:
    parser = cli.Parser(
        prog=prog,
        description="Measure speed and exactness of the decoding modes over many prompts.",
        epilog=f"example:\n  {prog} --prompts humaneval --limit 20 --out runs/small\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        default=HELDOUT,
        help=f"a file of JSON lines with a field 'prompt', plain or .gz; {HUMANEVAL!r} (a local "
        f"HumanEval.jsonl[.gz], or the hub's); default: {HELDOUT!r}, functions of the standard "
        "library that the shipped models have not seen",
    )
    parser.add_argument("--limit", metavar="N", type=cli.positive_int, help="first N prompts only")
    parser.add_argument("--max-new-tokens", metavar="N", type=cli.positive_int, default=128)
    parser.add_argument(
        "--modes",
        metavar="A,B",
        type=_names(cli.MODES),
        help=f"of {','.join(cli.MODES)}; default: all that the stack can",
    )
    parser.add_argument(
        "--sampling",
        metavar="A,B",
        type=_names(tuple(SAMPLINGS)),
        default=["greedy"],
        help=f"of {','.join(SAMPLINGS)}; default: greedy",
    )
    parser.add_argument(
        "--peers",
        metavar="A,B",
        type=_names(PEERS),
        default=[],
        help=f"other engines on the same weights, of {','.join(PEERS)} "
        "(pip install '.[peers]'); default: none",
    )
    parser.add_argument(
        "--ablations",
        metavar="N",
        type=cli.positive_int,
        help="on the first N prompts, measure what each part is worth too: some thirty plans, "
        "and schemes of speculative sampling (minutes a prompt)",
    )
    parser.add_argument(
        "--by-length",
        action="store_true",
        help="measure no prompts, but what a round takes by the length of the text, in a buffer "
        "of the whole context and in one that just fits",
    )
    parser.add_argument(
        "--other-baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the baseline in the other of float32 and bfloat16 too: speed-ups are over "
        "the faster one (default: yes)",
    )
    parser.add_argument("--repeats", metavar="N", type=cli.positive_int, default=1)
    parser.add_argument("--seed", metavar="S", type=cli.seed, default=0)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results.json; what it holds already is not measured again",
    )
    cli.add_stack_arguments(parser)
    return parser


def _by_length(args: argparse.Namespace) -> None:
    from ssd_jax.benchmark.ablations import markdown
    from ssd_jax.benchmark.by_length import rounds_by_length

    stack, plan = cli.load_stack(args)
    plans = _plans(stack, args.modes or cli.modes_of(stack), plan, ["greedy"])
    options = {"seed": args.seed, "say": lambda line: print(line, file=sys.stderr)}
    print(markdown(rounds_by_length(stack, plans, **options)))


def _benchmark(args: argparse.Namespace) -> None:
    from ssd_jax.benchmark.alone import PassesAlone, enough

    prompts = load_prompts(args.prompts, args.limit)
    stack, plan = cli.load_stack(args)
    plans = _plans(stack, args.modes or cli.modes_of(stack), plan, args.sampling)
    conditions = results.conditions(stack, plans, _options(args, len(prompts)))
    document: Record = {
        "schema": results.SCHEMA,
        "conditions": conditions,
        "costs": {},
        "summary": {},
    }
    document |= results.continued(args.out, conditions) if args.out else {"records": []}
    document["conditions"] = conditions
    own = _stacks(stack, plans, args)
    runners = {
        mode: _runner(*pair, own.get(f"{mode}{SAMPLED}", pair)[1], args.max_new_tokens)
        for mode, pair in own.items()
        if not mode.endswith(SAMPLED)
    }
    scratch = tempfile.TemporaryDirectory()  # until the process ends: peers read from it
    peers = _open_peers(args, stack, prompts, Path(scratch.name))
    settings = {peer.name: {"setting": peer.setting, "skipped": peer.skipped} for peer in peers}
    document["peers"] = document.get("peers", {}) | settings
    runners |= {peer.name: _peer_runner(peer, stack, args.max_new_tokens) for peer in peers}
    _drop_incomplete(document["records"], list(runners))
    saved, clock = time.monotonic(), None
    try:
        for records in _progress(runners, prompts, args, document["records"]):
            document["records"] += records
            if clock is None and enough(document["records"], len(prompts)):
                clock = PassesAlone(own, document["records"])
            if clock is not None:
                clock.turn()
            if args.out and time.monotonic() - saved > _SAVE_SECONDS:
                results.write(args.out, document)
                saved = time.monotonic()
        if document["records"]:
            clock = clock or PassesAlone(own, document["records"])
            document["costs"] |= clock.costs()
            document["roofline"] = _roofline(document["costs"], conditions)
            if args.out:
                document["examples"] = _examples(stack, plans, prompts, args)
        if args.ablations and "ablations" not in document:
            document["ablations"] = _ablations(stack, prompts[: args.ablations], args)
    finally:  # an interrupted run keeps what it measured
        if document["records"]:
            _report(document, args.out)


def _plans(
    stack: Stack, modes: Sequence[str], plan: Plan | str | None, samplings: Sequence[str]
) -> dict[str, Plan]:
    """The plan of each mode; of ``MODE, sampled`` too, where sampled texts follow another."""
    from ssd_jax.generate import resolve_plan

    kinds = sorted({measure.is_sampled(name) for name in samplings})
    plans: dict[str, Plan] = {}
    for mode in modes:
        given = plan if mode == "staged" else None
        own = [resolve_plan(stack, mode, given, sampled=sampled)[0] for sampled in kinds]
        plans[mode] = own[0]
        if own[-1] != own[0]:
            plans[f"{mode}{SAMPLED}"] = own[-1]
    return plans


def _options(args: argparse.Namespace, prompts: int) -> Record:
    """The options that records depend on."""
    from ssd_jax import checkpoint

    def name(path: str | None) -> str | None:
        return Path(path).name if path else None

    return {
        "models": {
            "checkpoint": None if args.oracle else name(args.checkpoint) or "python-small",
            "oracle": name(args.oracle),
            "drafts": [name(draft) for draft in args.draft],
            "ngram": name(args.ngram),
        },
        "label": checkpoint.load_label(args.oracle) if args.oracle else None,
        "prompts": name(args.prompts),
        "limit": args.limit,
        "prompt_count": prompts,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "seed": args.seed,
    }


def _stacks(stack: Stack, plans: dict[str, Plan], args) -> dict[str, tuple[Stack, Plan]]:
    """Stack and plan of each own mode, the baseline in the other dtype among them."""
    own = {mode: (stack, plan) for mode, plan in plans.items()}
    if BASELINE in plans and args.other_baseline:
        dtype = next(name for name in DTYPES if name != stack.oracle.numerics)
        changed = argparse.Namespace(**(vars(args) | {"dtype": dtype, "plan": None}))
        own[f"{BASELINE}-{dtype}"] = (cli.load_stack(changed)[0], plans[BASELINE])
    return own


def _runner(stack: Stack, greedy: Plan, sampled: Plan, max_new_tokens: int) -> Runner:
    import ssd_jax
    from ssd_jax.generate import encode_prompt

    def runner(prompt: str, *, temperature: float, **options) -> Record:
        tokens = encode_prompt(stack, prompt)
        options |= dict(max_new_tokens=max_new_tokens, temperature=temperature)
        plan = sampled if temperature > 0 else greedy

        def generate() -> GenerationResult:
            return ssd_jax.generate(stack, tokens, plan=plan, **options)

        return {"prompt_tokens": len(tokens)} | measure.timed(generate, stack)

    return runner


def _open_peers(
    args: argparse.Namespace, stack: Stack, prompts: list[str], scratch: Path
) -> list[Peer]:
    from ssd_jax.benchmark.peers import open_peer
    from ssd_jax.generate import encode_prompt

    if not args.peers:
        return []
    if args.oracle:
        oracle, draft = Path(args.oracle), Path(args.draft[0]) if args.draft else None
    else:
        trio = shipped.locate(args.checkpoint or cli.shipped_checkpoint())
        oracle, draft = trio / "oracle", trio / "draft" if stack.drafts else None
    calibration = [encode_prompt(stack, prompt) for prompt in prompts[:3]]
    return [
        open_peer(
            name,
            oracle,
            draft,
            calibration=calibration,
            max_new_tokens=args.max_new_tokens,
            scratch=scratch,
            say=lambda line: print(line, file=sys.stderr),
        )
        for name in args.peers
    ]


def _peer_runner(peer: Peer, stack: Stack, max_new_tokens: int) -> Runner:
    from ssd_jax.generate import encode_prompt

    def runner(prompt: str, *, temperature: float, seed: int, top_k: int | None = None) -> Record:
        tokens = encode_prompt(stack, prompt)
        run = peer.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        return measure.told_by_a_peer(run, peer.dtype, tokens, stack)

    return runner


def _drop_incomplete(records: list[Record], modes: Sequence[str]) -> None:
    """Modes are compared where they took turns: what lacks one of them is measured anew."""
    found: dict[tuple, set[str]] = {}
    for record in records:
        found.setdefault(measure.combination(record), set()).add(record["mode"])
    complete = {key for key, names in found.items() if names >= set(modes)}
    records[:] = [r for r in records if measure.combination(r) in complete]


def _roofline(costs: Costs, conditions: Record) -> Record:
    """What the device can do, and what passes of the oracle do (the paper's Figure 1)."""
    import jax.numpy as jnp

    from ssd_jax.costs import roofline

    points = []
    for mode, stages in costs.items():
        dtype = jnp.dtype(mode.removeprefix(f"{BASELINE}-") if "-" in mode else conditions["dtype"])
        weights = conditions["weight_bytes"]["oracle"] / jnp.dtype(conditions["dtype"]).itemsize
        cost = stages["oracle"]
        operations = 2 * weights * cost["width"]
        points.append(
            {
                "name": f"{mode}: {cost['width']} token{'s' * (cost['width'] > 1)} a pass",
                "intensity": operations / (weights * dtype.itemsize),
                "flops": operations / cost["seconds"],
            }
        )
    bandwidth, flops = roofline(jnp.dtype(conditions["dtype"]))
    return {"bandwidth": bandwidth, "flops": flops, "points": points}


def _ablations(stack: Stack, prompts: list[str], args: argparse.Namespace) -> Record:
    """Tables of what each part is worth, by name."""
    from ssd_jax.benchmark import ablations, schemes

    options = {
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "say": lambda line: print(line, file=sys.stderr),
    }
    samplings = {name: SAMPLINGS[name] for name in args.sampling}
    tables = {"parts": ablations.ablate(stack, prompts, samplings=samplings, **options)}
    if stack.drafts:
        tables["schemes of sampling"] = schemes.compare(stack, prompts, **options)
    for name, rows in tables.items():
        print(f"{name}:\n{ablations.markdown(rows)}\n")
    return tables


def _examples(
    stack: Stack, plans: dict[str, Plan], prompts: list[str], args: argparse.Namespace
) -> list[Record]:
    """Of the first prompts, for the report."""
    if "staged" not in plans or stack.tokenizer is None:
        return []
    from ssd_jax.benchmark.examples import example

    return [
        {"prompt_index": index, "sampling": sampling}
        | example(
            stack,
            prompt,
            of_kind(plans, "staged", sampling),
            max_new_tokens=args.max_new_tokens,
            seed=args.seed + index,
            rounds=EXAMPLE_ROUNDS,
            **SAMPLINGS[sampling],
        )
        for index, prompt in enumerate(prompts[:EXAMPLES])
        for sampling in args.sampling
    ]


def _progress(
    runners: dict[str, Runner], prompts: list[str], args: argparse.Namespace, before: list[Record]
) -> Iterator[list[Record]]:
    """:func:`measure.run`, showing progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    done = {measure.combination(record) for record in before}
    total = len(prompts) * len(args.sampling) * args.repeats
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        for records in measure.run(
            runners,
            prompts,
            samplings=args.sampling,
            repeats=args.repeats,
            seed=args.seed,
            done=done,
        ):
            yield records
            progress.advance(task)


def _report(document: Record, out: str | None) -> None:
    from rich.console import Console

    document["summary"] = summarize(document["records"], document["costs"])
    document["peak_memory_bytes"] = results.peak_memory_bytes()
    Console().print(*summary_tables(document["summary"]))
    for line in remarks(document):
        print(line)
    if out is not None:
        print(f"results in {results.write(out, document)}", file=sys.stderr)
        from ssd_jax.benchmark import report

        print(f"report in {report.write(Path(out), document)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, prog: str = "benchmark.py") -> int:
    """Entry point of ``scripts/benchmark.py``; returns the exit status."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    cli.check_stack_arguments(parser, args)
    return cli.run_command(lambda: (_by_length if args.by_length else _benchmark)(args))
