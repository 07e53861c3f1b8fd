"""The command line ``scripts/decode.py``, and what its sisters share with it.

Standard output carries the text, or with ``--json`` exactly one object; with ``--json`` everything
else goes to standard error. Whatever a user can put right is one line ``error: ...`` and exit
status 2. Arguments are checked before a model is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax import progress, shipped
from ssd_jax.errors import PromptError, SsdError
from ssd_jax.plan import DEFAULT, MODES

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult

COMPARE_REPEATS = 3  # odd, so that the median is one of the runs
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  decode.py "def fibonacci(n):"
  decode.py --compare --max-new-tokens 64 "class Stack:"
  decode.py --temperature 0.8 --top-p 0.95 --seed 7 --json - < prompt.py
  decode.py --stop $'\ndef ' --stop $'\nclass ' --max-time 5 "def fibonacci(n):"
  decode.py --temperature 1 --top-k 50 --n 4 "def fibonacci(n):"
  decode.py --logprobs 5 --json "def fibonacci(n):"
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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error."""

    def error(self, message: str):
        self.exit(EXIT_USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def top_k(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2**64), not {value}")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, not {text}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0.0):
        raise argparse.ArgumentTypeError(f"must be finite and positive, not {text}")
    return value


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def top_p(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], not {text}")
    return value


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers like 1,2,3, not {text!r}") from None


def add_stack_arguments(parser: argparse.ArgumentParser, *, plan: bool = True) -> None:
    """The arguments that :func:`load_stack` reads, with or without ``--plan``."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--checkpoint",
        metavar="X",
        help="a trio: a folder, or the name of a shipped one (default: python-small)",
    )
    group.add_argument("--oracle", metavar="X", help="oracle: a folder or a hub name")
    group.add_argument(
        "--draft",
        metavar="Y",
        action="append",
        default=[],
        help="draft: a folder or a hub name; may be repeated, largest first",
    )
    group.add_argument("--ngram", metavar="F", help="Katz trigram, a .safetensors file")
    group.add_argument("--tokenizer", metavar="T", help="tokenizer.json, or a folder that holds it")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="operands of the models; int8 rounds the weights of the oracle, which changes texts",
    )
    if plan:
        group.add_argument(
            "--plan",
            metavar="FILE",
            help=f"speculation plan, a JSON file, or {DEFAULT!r}; left out, mode staged follows "
            "the plan that tuning found for this device and these models, if it has run",
        )


def check_stack_arguments(parser: Parser, args: argparse.Namespace) -> None:
    if args.checkpoint and args.oracle:
        parser.error("--checkpoint and --oracle exclude each other; give one of them")
    if (args.draft or args.ngram) and not args.oracle:
        parser.error("--draft and --ngram need --oracle; name the oracle too")


def build_parser(prog: str = "decode.py") -> Parser:
    parser = Parser(
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
    add_stack_arguments(parser)
    group = parser.add_argument_group("decoding")
    group.add_argument("--mode", choices=MODES, default="staged", help="default: staged")
    group.add_argument("--max-new-tokens", metavar="N", type=positive_int, default=128)
    group.add_argument(
        "--temperature", metavar="T", type=temperature, default=0.0, help="0 (default) is greedy"
    )
    group.add_argument("--top-k", metavar="K", type=top_k, help="0 for the whole vocabulary")
    group.add_argument("--top-p", metavar="P", type=top_p)
    group.add_argument("--seed", metavar="S", type=seed, default=0)
    for name, words in _FURTHER_OPTIONS.items():
        group.add_argument(_flag(name), metavar="X", type=float, help=words)
    group.add_argument("--min-new-tokens", metavar="N", type=positive_int)
    group.add_argument(
        "--n",
        metavar="N",
        type=positive_int,
        default=1,
        help="so many continuations, with the seeds S, S + 1 and so on",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        type=not_empty,
        action="append",
        default=[],
        help="end the text before TEXT; may be repeated",
    )
    group.add_argument(
        "--max-time", metavar="SECONDS", type=seconds, help="begin no new tokens after that"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--compare", action="store_true", help="measure all modes and compare their output"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--logprobs",
        metavar="K",
        type=top_k,
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


def parse_args(argv: Sequence[str] | None = None, prog: str = "decode.py") -> argparse.Namespace:
    """Parse and cross-check; exits with status 2 after one line if something is wrong."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_stack_arguments(parser, args)
    sources = (args.prompt, args.prompt_file, args.prompt_tokens)
    given = sum(source is not None for source in sources)
    if args.interactive and (given or args.json or args.compare or args.html or args.svg):
        parser.error("--interactive asks for prompts; give none, nor what is said of one text")
    if not args.interactive and given != 1:
        parser.error("give exactly one of PROMPT, --prompt-file and --prompt-tokens")
    if args.plan and args.mode == "baseline":
        parser.error("--plan says how to speculate, which --mode baseline does not")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs are printed with --json only; add it")
    if args.n > 1 and (args.compare or args.svg):
        parser.error("--compare and --svg are of one text; leave --n at 1")
    return args


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


def shipped_checkpoint() -> Path:
    """The folder of the default trio; :class:`CheckpointError` if this installation has none."""
    return shipped.locate(shipped.DEFAULT)


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


def load_stack(args: argparse.Namespace, lap: Callable[[str], None] = lambda name: None):
    """What :func:`add_stack_arguments` named: the stack; and a plan, ``DEFAULT`` or ``None``."""
    path = None if args.oracle else args.checkpoint or shipped_checkpoint()
    with progress.stages("importing JAX"):
        import ssd_jax
        import ssd_jax.generate  # the package imports only what is asked for
        from ssd_jax.plan import Plan
    lap("imports")
    plan = getattr(args, "plan", None)
    if plan not in (None, DEFAULT):
        plan = Plan.load(plan)  # before the weights: it is quick to fail
    with progress.stages("loading the models"):
        if path is not None:
            stack = ssd_jax.load(path, tokenizer=args.tokenizer, dtype=args.dtype)
        else:
            stack = ssd_jax.load(
                oracle=args.oracle,
                drafts=args.draft,
                ngram=args.ngram,
                tokenizer=args.tokenizer,
                dtype=args.dtype,
            )
    lap("models")
    return stack, plan


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
    repeats: int = COMPARE_REPEATS,
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


def _console(stderr: bool = True):
    from rich.console import Console

    return Console(stderr=stderr)


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


def modes_of(stack) -> list[str]:
    """The modes a stack is capable of: classical speculation needs a draft model."""
    return [mode for mode in MODES if stack.drafts or mode != "speculative"]


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


def _decode(args: argparse.Namespace) -> None:
    laps = Laps()
    prompt = read_prompt(args)
    from ssd_jax.generation_config import GenerationConfig

    GenerationConfig(**config_options(args))  # refuses what makes no sense before weights are read
    stack, plan = load_stack(args, laps)
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
        measurements = _compare(decode, modes_of(stack), args.mode, first)
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


def _interact(args: argparse.Namespace) -> None:
    from ssd_jax.interactive import SETTINGS, Session

    stack, plan = load_stack(args)
    Session(stack, {name: getattr(args, name) for name in SETTINGS}, plan).run()


def _show_plan(stack, args: argparse.Namespace, plan) -> None:
    from ssd_jax.generate import resolve_plan

    plan, source = resolve_plan(stack, args.mode, plan, sampled=args.temperature > 0)
    print(f"plan of mode {args.mode}, {source}:\n{plan.to_json()}", file=sys.stderr)


def run_command(
    command: Callable[[], None],
    *,
    prefix: str = "error",
    remedy: str = "check the path and its permissions",
    interrupted: str = "interrupted",
) -> int:
    """Run ``command`` and turn what a user can put right into one line and an exit status.

    Args:
      command: what to run.
      prefix: what an error's line begins with.
      remedy: what to do about an error of the operating system.
      interrupted: what is printed on Ctrl-C.
    """
    try:
        command()
    except BrokenPipeError:
        # The reader has left (`| head`). Keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SsdError as error:
        return _fail(prefix, str(error))
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        return _fail(prefix, f"{named}{error.strerror or error}; {remedy}")
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _fail(prefix: str, message: str) -> int:
    print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


def main(argv: Sequence[str] | None = None, prog: str = "decode.py") -> int:
    """Entry point of ``scripts/decode.py``; returns the exit status."""
    args = parse_args(argv, prog)
    return run_command(lambda: _interact(args) if args.interactive else _decode(args))
