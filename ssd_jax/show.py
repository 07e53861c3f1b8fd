"""Showing where each token of a text came from (the paper's Figure 3)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_jax.errors import PromptError

if TYPE_CHECKING:
    from rich.text import Text

    from ssd_jax.batch import GenerationResult
    from ssd_jax.stack import Stack

# One style a stage; further drafts reuse the draft's.
STYLES = {"oracle": "bold red", "draft": "blue", "ngram": "green"}


def pieces(stack: Stack, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; the last of those that share a character has it.

    Raises:
      PromptError: the stack has no tokenizer.
    """
    if stack.tokenizer is None:
        raise PromptError("colouring needs text, but this stack has no tokenizer; load one")
    shown, added = "", []
    for end in range(1, len(tokens) + 1):
        # Whole prefixes, because one character may be spread over several tokens.
        whole = stack.tokenizer.decode(tokens[:end]).rstrip("\ufffd")
        added.append(whole[len(shown) :])
        shown = max(shown, whole, key=len)
    return added


def colored_text(stack: Stack, result: GenerationResult, prompt: str = "") -> Text:
    """A continuation coloured by the stage that proposed each token, after a dim prompt.

    Raises:
      PromptError: the stack has no tokenizer.
    """
    from rich.text import Text

    text = Text().append(prompt, style="dim")
    for piece, origin in zip(pieces(stack, result.tokens), result.origins, strict=True):
        text.append(piece, style=STYLES[origin.rstrip("0123456789")])
    return text


def has_colors() -> bool:
    """Whether standard output shows colours: a terminal, and no ``NO_COLOR``."""
    from rich.console import Console

    console = Console()
    return console.color_system is not None and not console.no_color


def print_colored(stack: Stack, result: GenerationResult, prompt: str = "") -> None:
    """Print the coloured text to standard output, and a legend to standard error.

    Raises:
      PromptError: the stack has no tokenizer.
    """
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    # Not by a console, which would wrap lines and put spaces for tabs.
    text = colored_text(stack, result, prompt)
    for span in text.spans:
        style = Style.parse(str(span.style))
        piece = text.plain[span.start : span.end]
        sys.stdout.write(style.render(piece, color_system=ColorSystem.STANDARD))
    sys.stdout.write("\n")
    sys.stdout.flush()
    Console(stderr=True).print(legend())


def print_stats(result: GenerationResult, **options) -> None:
    """Print a text's statistics as a table on standard error.

    Args:
      result: the text.
      options: with which it was generated, ``mode`` among them.
    """
    from rich.console import Console
    from rich.table import Table

    from ssd_jax.pages.text import figures

    table = Table(show_header=False)
    for name, words in figures(result, **options):
        table.add_row(name, words)
    Console(stderr=True).print(table, highlight=False)


def legend() -> Text:
    """One line that names the colours."""
    from rich.text import Text

    line = Text("proposed by: ")
    for stage, style in STYLES.items():
        line.append(stage, style=style).append("  ")
    return line


def save_svg(path: str | os.PathLike, stack: Stack, result: GenerationResult, prompt: str) -> None:
    """Write the coloured text as an SVG picture."""
    from rich.console import Console

    from ssd_jax.files import atomic_path

    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=92, file=nowhere, force_terminal=True)
        console.print(colored_text(stack, result, prompt))
        console.print()
        console.print(legend())
        stats = result.stats
        title = f"{stats.new_tokens} tokens in {stats.rounds} oracle passes"
        svg = console.export_svg(title=title)
    # Rich's drawing would fetch its fonts from the network; the viewer's own monospace will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(svg, encoding="utf-8")
