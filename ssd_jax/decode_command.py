"""``scripts/decode.py``.

Standard output carries the text, or with ``--json`` exactly one object; with ``--json`` everything
else goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax import cli, progress
from ssd_jax.comparison import (
    Measurement,
    comparison_table,
    json_object,
    measure,
    output_identical,
)
from ssd_jax.errors import PromptError
from ssd_jax.plan import MODES

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult

EXAMPLES = """\
examples:
  decode.py "def fibonacci(n):"
  decode.py --compare --max-new-tokens 64 "class Stack:"
  decode.py --temperature 0.8 --top-p 0.95 --seed 7 --json - < prompt.py
  decode.py --stop $'\ndef ' --stop $'\nclass ' --max-time 5 "def fibonacci(n):"
  decode.py --temperature 1 --top-k 50 --n 4 "def fibonacci(n):"
  decode.py --logprobs 5 --json "def fibonacci(n):"
  decode.py --verify --prompts humaneval --limit 20
  decode.py --oracle ./oracle --draft ./draft --ngram ngram.safetensors "import os"

Compiled programs are kept for the next run in the user's cache folder, or below $SSD_JAX_CACHE;
JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
"""


# Options of GenerationConfig that the command line hands on as they are.
_FURTHER_OPTIONS = {
    "min_p": "only tokens at least X times as probable as the most probable one",
    "typical_p": "only tokens of typical surprise that make up this mass",
    "repetition_penalty": "above 1 makes tokens of prompt and text rarer",
    "presence_penalty": "above 0 makes tokens of the text rarer",
    "frequency_penalty": "the same, for each time they occur",
}


def build_parser(prog: str = "decode.py") -> cli.Parser:
    parser = cli.Parser(
        prog=prog,
        description="Continue a prompt by staged speculative decoding. The text is the one "
        "that the oracle alone would write; the mode only changes the speed.",
        epilog=EXAMPLES.replace("decode.py", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - reads stdin")
    parser.add_argument("--prompt-file", metavar="F", help="read the prompt from a UTF-8 file")
    parser.add_argument(
        "--prompt-tokens",
        metavar="1,2,3",
        type=_token_ids,
        help="the prompt as token ids, for models without a tokenizer",
    )
    cli.add_stack_arguments(parser)
    group = parser.add_argument_group("decoding")
    group.add_argument("--mode", choices=MODES, default="staged", help="default: staged")
    group.add_argument("--max-new-tokens", metavar="N", type=cli.positive_int, default=128)
    group.add_argument(
        "--temperature",
        metavar="T",
        type=cli.temperature,
        default=0.0,
        help="0 (default) is greedy",
    )
    group.add_argument("--top-k", metavar="K", type=cli.top_k, help="0 for the whole vocabulary")
    group.add_argument("--top-p", metavar="P", type=cli.top_p)
    group.add_argument("--seed", metavar="S", type=cli.seed, default=0)
    for name, words in _FURTHER_OPTIONS.items():
        group.add_argument(_flag(name), metavar="X", type=float, help=words)
    group.add_argument("--min-new-tokens", metavar="N", type=cli.positive_int)
    group.add_argument(
        "--n",
        metavar="N",
        type=cli.positive_int,
        default=1,
        help="so many continuations, with the seeds S, S + 1 and so on",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        type=cli.not_empty,
        action="append",
        default=[],
        help="end the text before TEXT; may be repeated",
    )
    group.add_argument(
        "--max-time", metavar="SECONDS", type=cli.seconds, help="begin no new tokens after that"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--compare", action="store_true", help="measure all modes and compare their output"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare speculation with plain decoding, text by text, and samples with the oracle's "
        "probabilities; status 1 if they differ by more than rounding explains",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="with --verify: humaneval, heldout (default) or a JSON-lines file; --limit N of them",
    )
    group.add_argument("--limit", metavar="N", type=cli.positive_int, help="default: 8, or all")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--logprobs",
        metavar="K",
        type=cli.top_k,
        help="with --json: each token's log-probability and K alternatives",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="also show the plan, where it comes from, and where the time to the first text went",
    )
    group.add_argument(
        "--color",
        action="store_true",
        help="colour each token by the stage that proposed it (on a terminal, unless NO_COLOR)",
    )
    group.add_argument("--stats", action="store_true", help="show how the text came about")
    group.add_argument(
        "--html", metavar="FILE", help="write a page: the text by origin, and each round's tree"
    )
    group.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="ask for prompts until /quit; /help there lists the commands",
    )
    group.add_argument(
        "--svg", metavar="FILE", help="draw the text, coloured by the stage that proposed it"
    )
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers like 1,2,3, not {text!r}") from None


def parse_args(argv: Sequence[str] | None = None, prog: str = "decode.py") -> argparse.Namespace:
    """Parse and cross-check; exits with status 2 after one line if something is wrong."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    cli.check_stack_arguments(parser, args)
    sources = (args.prompt, args.prompt_file, args.prompt_tokens)
    given = sum(source is not None for source in sources)
    if args.interactive and (given or args.json or args.compare or args.html or args.svg):
        parser.error("--interactive asks for prompts; give none, nor what is said of one text")
    several = _check_verify(parser, args, given)
    if not args.interactive and not several and given != 1:
        parser.error("give exactly one of PROMPT, --prompt-file and --prompt-tokens")
    if args.plan and args.mode == "baseline":
        parser.error("--plan says how to speculate, which --mode baseline does not")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs are printed with --json only; add it")
    if args.n > 1 and (args.compare or args.svg):
        parser.error("--compare and --svg are of one text; leave --n at 1")
    return args


def _check_verify(parser: cli.Parser, args: argparse.Namespace, given: int) -> bool:
    """Complain about what does not go with ``--verify``; whether it has prompts of its own."""
    if not args.verify:
        if args.prompts or args.limit:
            parser.error("--prompts and --limit are of --verify; add it")
        return False
    if args.interactive or args.compare or args.html or args.svg or args.plan or args.n > 1:
        parser.error("--verify compares by plans of its own and shows no text; leave the rest out")
    if given > (0 if args.prompts else 1):
        parser.error("--verify takes one prompt or --prompts, not both")
    return given == 0


def main(argv: Sequence[str] | None = None, prog: str = "decode.py") -> int:
    """Entry point of ``scripts/decode.py``; returns the exit status."""
    args = parse_args(argv, prog)
    command = _verify if args.verify else _interact if args.interactive else _decode
    return cli.run_command(lambda: command(args))


def read_prompt(args: argparse.Namespace) -> str | list[int]:
    """The prompt as text, or as token ids.

    Raises:
      PromptError: the text is not UTF-8.
      OSError: the file cannot be read.
    """
    if args.prompt_tokens is not None:
        return args.prompt_tokens
    try:
        # Bytes, because text mode would turn \r\n into \n behind the tokenizer's back.
        if args.prompt_file is not None:
            return Path(args.prompt_file).read_bytes().decode("utf-8")
        if args.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        args.prompt.encode("utf-8")  # the shell hands over invalid bytes as lone surrogates
    except UnicodeError:
        raise PromptError("the prompt is not valid UTF-8; convert it first") from None
    return args.prompt


class Laps:
    """Seconds since it was made, and since its last call, by name."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return self.last - self.start


def _decode(args: argparse.Namespace) -> None:
    laps = Laps()
    prompt = read_prompt(args)
    from ssd_jax.generation_config import GenerationConfig

    GenerationConfig(**config_options(args))  # refuses what makes no sense before weights are read
    stack, plan = cli.load_stack(args, laps)
    import ssd_jax

    def decode(mode: str, on_text: Callable[[str], None] | None = None, **more) -> Any:
        own = plan if mode == args.mode else None  # a plan is made for one mode
        options = config_options(args) | more
        return ssd_jax.generate(stack, prompt, mode=mode, plan=own, on_text=on_text, **options)

    if args.verbose:
        _show_plan(stack, args, plan)
    if args.n > 1:
        with progress.stages("decoding"):
            samples = decode(args.mode, num_return_sequences=args.n)
        return _print_samples(args, prompt, samples)
    first = _first_run(decode, args, prompt, laps)
    if args.verbose:
        _print_start(laps, first)
    _show(stack, args, prompt, plan, first)
    measurements = {args.mode: Measurement(first, [])}
    if args.compare:
        measurements = _compare(decode, cli.modes_of(stack), args.mode, first)
        _print_comparison(measurements, stderr=args.json)
    elif not args.json:
        _print_summary(first)
    if args.json:
        print(json.dumps(json_object(args.mode, measurements), allow_nan=False), flush=True)


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of one continuation, under the names of ``GenerationConfig``."""
    return dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_strings=args.stop,
        max_time=args.max_time,
        logprobs=args.logprobs,
        min_new_tokens=args.min_new_tokens,
        **{name: getattr(args, name) for name in _FURTHER_OPTIONS},
    )


class _TextPrinter:
    """Writes prompt and continuation to standard output as the text is committed."""

    def __init__(self, prompt: str | list[int], status, lap: Callable[[str], None]):
        self.prompt, self.status, self.lap, self.started = prompt, status, lap, False

    def __call__(self, piece: str) -> None:
        self._start()
        sys.stdout.write(piece)
        sys.stdout.flush()

    def finish(self, result: GenerationResult) -> None:
        if not self.started:  # no text at all, or models without a tokenizer
            self._start()
            if not result.text:
                sys.stdout.write(",".join(str(int(token)) for token in result.tokens))
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _start(self) -> None:
        if self.started:
            return
        self.started = True
        self.lap("text")
        self.status.stop()  # the spinner would redraw over the text
        if isinstance(self.prompt, str):
            _console(stderr=False).out(self.prompt, style="dim", highlight=False, end="")


def _first_run(
    decode, args: argparse.Namespace, prompt: str | list[int], lap: Callable[[str], None]
) -> GenerationResult:
    """Run ``args.mode`` once, showing the text as it comes unless ``--json`` is set."""
    with progress.stages("decoding") as status:
        if args.json or _colored(args):
            result = decode(args.mode)
            lap("text")
            return result
        printer = _TextPrinter(prompt, status, lap)
        result = decode(args.mode, on_text=printer)
        printer.finish(result)
        return result


def _colored(args: argparse.Namespace) -> bool:
    """Whether the text is shown once it is complete, in colours."""
    from ssd_jax import show

    return args.color and not args.json and show.has_colors()


def _compare(
    decode, modes: Sequence[str], mode: str, first: GenerationResult
) -> dict[str, Measurement]:
    """Measure ``modes``; ``first`` is ``mode``'s warm-up."""
    with progress.stages("measuring all modes"):
        return measure(decode, {name: first if name == mode else decode(name) for name in modes})


def _print_comparison(measurements: dict[str, Measurement], *, stderr: bool) -> None:
    console = _console(stderr=stderr)
    console.print(comparison_table(measurements))
    identical = output_identical(measurements)
    console.print(f"output identical: {'yes' if identical else 'no'}", highlight=False)
    if not identical:
        margin = min(m.median.stats.min_margin for m in measurements.values())
        console.print(
            f"smallest margin between the two best tokens: {margin:.3g} "
            "(a margin near 0 is a tie that rounding decides)",
            highlight=False,
        )


def _print_summary(result: GenerationResult) -> None:
    stats = result.stats
    _console().print(
        f"{stats.new_tokens} tokens ({result.finish_reason}) in {stats.seconds:.2f} s, "
        f"{stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_oracle_pass:.2f} tokens per oracle pass; "
        f"{'read from the cache' if stats.from_cache else 'compiled'} in "
        f"{stats.compile_seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _print_start(laps: Laps, result: GenerationResult) -> None:
    stats = result.stats
    program = "read" if stats.from_cache else "compiled"
    _console().print(
        f"first text after {laps.total:.2f} s: imports {laps.seconds['imports']:.2f}, "
        f"models {laps.seconds['models']:.2f}, program {stats.compile_seconds:.2f} ({program}), "
        f"rest {laps.seconds['text'] - stats.compile_seconds:.2f}",
        highlight=False,
        soft_wrap=True,
    )


def _print_samples(
    args: argparse.Namespace, prompt: str | list[int], samples: Sequence[GenerationResult]
) -> None:
    """Several continuations, each below a line that says how to get it alone."""
    objects = [json_object(args.mode, {args.mode: Measurement(one, [])}) for one in samples]
    if args.json:
        print(json.dumps({"mode": args.mode, "samples": objects}, allow_nan=False), flush=True)
        return
    for i, one in enumerate(samples):
        text = one.text or ",".join(map(str, one.tokens))
        shown = prompt if isinstance(prompt, str) else ""
        print(f"== seed {(args.seed + i) % 2**64} ({one.finish_reason})\n{shown}{text}", flush=True)


def _show(stack, args: argparse.Namespace, prompt, plan, result: GenerationResult) -> None:
    """The ways of looking at a text that were asked for."""
    from ssd_jax import show
    from ssd_jax.generation_config import GenerationConfig

    text = prompt if isinstance(prompt, str) else ""
    if _colored(args):
        show.print_colored(stack, result, text)
    if args.svg:
        show.save_svg(args.svg, stack, result, text)
    config = GenerationConfig(**config_options(args))
    options = {"mode": args.mode, "max_new_tokens": args.max_new_tokens}
    options |= config.sampling_options()
    if args.stats:
        show.print_stats(result, **options)
    if args.html:
        from ssd_jax.generate import resolve_plan
        from ssd_jax.pages import text as page

        with progress.stages("running the rounds one by one"):
            plan, _ = resolve_plan(stack, args.mode, plan, sampled=args.temperature > 0)
            page.save(args.html, stack, prompt, result, plan, **options)


def _verify(args: argparse.Namespace) -> int:
    from ssd_jax.benchmark.prompts import HELDOUT, load_prompts

    limit = args.limit or (None if args.prompts else 8)
    if (args.prompt, args.prompt_file, args.prompt_tokens) == (None, None, None):
        prompts = load_prompts(args.prompts or HELDOUT, limit)
    else:
        prompts = [read_prompt(args)]
    stack, _ = cli.load_stack(args)
    import ssd_jax
    from ssd_jax.verification import SAMPLED, WARPERS

    options = {name: getattr(args, name) for name in WARPERS} if args.temperature else SAMPLED
    with progress.stages("comparing texts"):
        found = ssd_jax.verify_lossless(
            stack, prompts, max_new_tokens=args.max_new_tokens, sampled=options
        )
    print(json.dumps(found.as_dict(), allow_nan=False) if args.json else found, flush=True)
    return 0 if found.lossless else 1


def _show_plan(stack, args: argparse.Namespace, plan) -> None:
    from ssd_jax.generate import resolve_plan

    plan, source = resolve_plan(stack, args.mode, plan, sampled=args.temperature > 0)
    print(f"plan of mode {args.mode}, {source}:\n{plan.to_json()}", file=sys.stderr)


def _interact(args: argparse.Namespace) -> None:
    from ssd_jax.interactive import SETTINGS, Dialogue

    stack, plan = cli.load_stack(args)
    Dialogue(stack, {name: getattr(args, name) for name in SETTINGS}, plan).run()


def _console(stderr: bool = True):
    from rich.console import Console

    return Console(stderr=stderr)
