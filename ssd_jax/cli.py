"""What all command lines share: arguments, loading a stack, errors, exit status.

Whatever a user can put right is one line ``error: ...`` and exit status 2. Arguments are checked
before a model is read.
"""

from __future__ import annotations

import argparse
import atexit
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ssd_jax import progress, shipped
from ssd_jax.errors import SsdError, ran_out_of_memory
from ssd_jax.plan import DEFAULT, MODES

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


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
    group.add_argument(
        "--exact",
        action="store_true",
        help="logits that do not depend on a pass's other rows, to the bit: near ties are decided "
        "as plain decoding with --exact does; slower",
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


def shipped_checkpoint() -> Path:
    """The folder of the default trio; :class:`CheckpointError` if this installation has none."""
    return shipped.locate(shipped.DEFAULT)


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
            stack = ssd_jax.load(path, tokenizer=args.tokenizer, dtype=args.dtype, exact=args.exact)
        else:
            stack = ssd_jax.load(
                oracle=args.oracle,
                drafts=args.draft,
                ngram=args.ngram,
                tokenizer=args.tokenizer,
                dtype=args.dtype,
                exact=args.exact,
            )
    lap("models")
    return stack, plan


def modes_of(stack) -> list[str]:
    """The modes a stack is capable of: classical speculation needs a draft model."""
    return [mode for mode in MODES if stack.drafts or mode != "speculative"]


def run_command(
    command: Callable[[], int | None],
    *,
    prefix: str = "error",
    remedy: str = "check the path and its permissions",
    interrupted: str = "interrupted",
) -> int:
    """Run ``command`` and turn what a user can put right into one line and an exit status.

    Args:
      command: what to run; may return an exit status.
      prefix: what an error's line begins with.
      remedy: what to do about an error of the operating system.
      interrupted: what is printed on Ctrl-C.
    """
    try:
        with _lasting_interrupts():
            return command() or 0
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
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return _fail(prefix, "out of memory; use a smaller batch, shorter texts or smaller models")
    return 0


@contextmanager
def _lasting_interrupts() -> Iterator[None]:
    """Ctrl-C counts wherever it arrives. In a callback of the garbage collector, and JAX has one,
    Python would print its exception and go on; here it comes again a moment later."""
    otherwise, main = sys.unraisablehook, threading.main_thread().ident

    def ignored(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            otherwise(unraisable)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = otherwise


def leave(status: int) -> NoReturn:
    """End the process. After an interruption, without the interpreter's own end: what it tears
    down may still be in use by XLA's threads, and a crash would hide the status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
    if status == EXIT_INTERRUPTED:
        atexit._run_exitfuncs()  # temporary files
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fail(prefix: str, message: str) -> int:
    print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR
