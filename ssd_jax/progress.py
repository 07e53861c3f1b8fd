"""A spinner on standard error that names what is being done, and for how long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status
    from rich.text import Text

_LOGGER = logging.getLogger("ssd_jax")


class _Stage:
    """What is being done, with its seconds once they are worth telling."""

    def __init__(self, words: str):
        self.words, self.since = words, time.monotonic()

    def __rich__(self) -> Text:
        from rich.text import Text

        seconds = time.monotonic() - self.since
        return Text(self.words if seconds < 1 else f"{self.words} ({seconds:.0f} s)")


class _Handler(logging.Handler):
    def __init__(self, status: Status):
        super().__init__(logging.INFO)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "stays", False):
            print_ = self.status.console.print
            print_(record.getMessage(), markup=False, highlight=False, soft_wrap=True)
        else:
            self.status.update(_Stage(record.getMessage()))


@contextmanager
def stages(first: str) -> Iterator[Status]:
    """Show ``first``, then what the package logs (level ``INFO``): weights, compilation.

    Nothing is shown where standard error is no terminal, but for records with the attribute
    ``stays``: they become lines of their own.
    """
    from rich.console import Console

    level = _LOGGER.level
    with Console(stderr=True).status(_Stage(first)) as status:
        handler = _Handler(status)
        _LOGGER.addHandler(handler)
        _LOGGER.setLevel(logging.INFO)
        try:
            yield status
        finally:
            _LOGGER.removeHandler(handler)
            _LOGGER.setLevel(level)
