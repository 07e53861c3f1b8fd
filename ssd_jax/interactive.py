"""``decode.py -i``: prompt after prompt with one stack, and commands to change how it decodes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ssd_jax import cli, files
from ssd_jax.errors import SsdError
from ssd_jax.plan import MODES

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult
    from ssd_jax.plan import Plan
    from ssd_jax.stack import Stack

HELP = """\
Type a prompt; a line that ends in a backslash goes on in the next. Commands:
  /more                      continue the last text
  /mode M                    baseline, speculative or staged
  /temperature T  /top-k K  /top-p P  /seed S  /max-new-tokens N
  /color on|off              colour tokens by the stage that proposed them
  /stats on|off              statistics after each text
  /html FILE                 write the last text with its trees as a page
  /show                      the settings
  /help  /quit               (Ctrl-D quits too; Ctrl-C stops a text)
"""


def _mode(text: str) -> str:
    if text not in MODES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MODES)}, not {text!r}")
    return text


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, not {text!r}")
    return text == "on"


SETTINGS: dict[str, Callable[[str], Any]] = {
    "mode": _mode,
    "temperature": cli.temperature,
    "top_k": cli.top_k,
    "top_p": cli.top_p,
    "seed": cli.seed,
    "max_new_tokens": cli.positive_int,
    "color": _switch,
    "stats": _switch,
}


@dataclasses.dataclass
class Dialogue:
    """One stack, and how it decodes until told otherwise.

    Attributes:
      stack: with a tokenizer.
      settings: a value for each name of ``SETTINGS``.
      plan: for the mode that the dialogue began with; others follow their own.
    """

    stack: Stack
    settings: dict[str, Any]
    plan: Plan | str | None = None
    last: tuple[str, GenerationResult, dict[str, Any]] | None = None

    def __post_init__(self):
        self._planned = self.settings["mode"]

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read and answer until ``/quit`` or the end of the input."""
        with _history():
            while (line := self._read(read)) is not None:
                try:
                    if self.answer(line):
                        return
                except (SsdError, OSError) as error:
                    print(f"error: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print("\nstopped", file=sys.stderr)

    def _read(self, read: Callable[[str], str]) -> str | None:
        ask, lines = ("> ", "| ") if sys.stdin.isatty() else ("", ""), []
        try:
            lines.append(read(ask[0]))
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(read(ask[1]))
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return ""
        return "\n".join(lines)

    def answer(self, line: str) -> bool:
        """Do what a line asks for; whether it asks to quit."""
        if not line:
            return False
        if not line.startswith("/"):
            self._decode(line)
            return False
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        if name.replace("-", "_") in SETTINGS:
            self._set(name, value)
        elif name == "help":
            print(HELP, end="", file=sys.stderr)
        elif name == "show":
            shown = [f"{k.replace('_', '-')} {v}" for k, v in self.settings.items()]
            print(", ".join(shown), file=sys.stderr)
        elif name == "more" and self.last:
            self._decode(self.last[0] + self.last[1].text)
        elif name == "html" and self.last and value:
            self._page(value)
        elif name != "quit":
            print(f"error: cannot do {line!r} now; /help lists the commands", file=sys.stderr)
        return name == "quit"

    def _set(self, name: str, value: str) -> None:
        key = name.replace("-", "_")
        try:
            self.settings[key] = SETTINGS[key](value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            print(f"error: /{name}: {error}", file=sys.stderr)

    def _decode(self, prompt: str) -> None:
        import ssd_jax
        from ssd_jax import show

        settings = dict(self.settings)
        color, stats = settings.pop("color") and show.has_colors(), settings.pop("stats")
        plan = self.plan if settings["mode"] == self._planned else None
        if color:
            result = ssd_jax.generate(self.stack, prompt, plan=plan, **settings)
            show.print_colored(self.stack, result)
        else:
            result = ssd_jax.generate(self.stack, prompt, plan=plan, on_text=_say, **settings)
            print()
        self.last = prompt, result, {"plan": plan, **settings}
        if stats:
            show.print_stats(result, **settings)

    def _page(self, path: str) -> None:
        from ssd_jax.generate import resolve_plan
        from ssd_jax.pages import text

        assert self.last is not None
        prompt, result, settings = self.last
        settings = dict(settings)
        plan, _ = resolve_plan(
            self.stack, settings["mode"], settings.pop("plan"), sampled=settings["temperature"] > 0
        )
        text.save(path, self.stack, prompt, result, plan, **settings)


def _say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@contextmanager
def _history():
    """Lines can be edited and come back in the next session, where the platform has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = files.user_cache("history")
    with suppress(OSError):  # the first session has none
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
        except OSError as error:
            print(f"history not kept: {error}", file=sys.stderr)
