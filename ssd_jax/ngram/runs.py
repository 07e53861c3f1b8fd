"""Distinct integers and how often each occurs, counted in bounded memory."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ssd_jax.errors import DataError

# Distinct values, ascending, and the count of each as uint32. A count never overflows, because
# counting.py refuses texts of 2**32 tokens.
Counts = tuple[np.ndarray, np.ndarray]


def count_distinct(values: np.ndarray) -> Counts:
    """The distinct ``values``, which are sorted in place. Takes 33 bytes for each at most."""
    values.sort()
    first = _starts(values)
    counts = np.diff(first, append=len(values)).astype(np.uint32)
    return values[first], counts


def merge_counts(parts: list[Counts]) -> Counts:
    """The sum of one or more counts. Takes 65 bytes for each of their values at most."""
    if len(parts) == 1:
        return parts[0]
    values, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(values, kind="stable")  # merges ascending parts instead of sorting anew
    values, counts = values[order], counts[order]
    first = _starts(values)
    # reduceat takes no empty list of starts.
    return values[first], np.add.reduceat(counts, first, dtype=np.uint32) if len(first) else counts


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a new value starts among ascending ones."""
    fresh = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=fresh[1:])
    return np.flatnonzero(fresh)


class SortedRuns:
    """Counts integers in a buffer that is written out, sorted, whenever it is full.

    Call :meth:`add` as often as needed, :meth:`finish` once, then :meth:`blocks` as often as
    needed, and :meth:`close` in any case. Integers that fit into the buffer never touch the disk.

    Args:
      capacity: integers buffered. The buffer takes 8 bytes for each, its counting 33 more.
      folder: where the temporary file goes; None for the system's folder of such files.
    """

    def __init__(self, capacity: int, folder: str | os.PathLike[str] | None):
        self._buffer = np.empty(capacity, np.int64)  # a page takes memory once it is written to
        self._held = 0
        self._scratch = _Scratch(folder)
        # Each reads its counts from one position to another, or to the end if that comes first.
        self._runs: list[Callable[[int, int], Counts]] = []

    def add(self, values: np.ndarray) -> None:
        """Count ``values`` (1-D, integer). Raises ``DataError`` if they cannot be written."""
        while len(values):
            part = values[: len(self._buffer) - self._held]
            self._buffer[self._held : self._held + len(part)] = part
            self._held += len(part)
            values = values[len(part) :]
            if self._held == len(self._buffer):
                self._spill()

    def finish(self) -> None:
        """Give the buffer back; nothing can be added from here on."""
        if self._runs:
            self._spill()
        else:
            values, counts = count_distinct(self._buffer[: self._held])
            self._runs.append(lambda start, stop: (values[start:stop], counts[start:stop]))
        self._buffer = np.empty(0, np.int64)

    def blocks(self, size: int, width: int) -> Iterator[Counts]:
        """All counts, ascending, merged some ``size`` at a time.

        Values with the same ``value // width`` come in one block, for which a block may exceed
        ``size`` by ``width`` for each run.
        """
        heads = dict.fromkeys(self._runs, 0)
        while True:
            share = max(1, size // len(self._runs))
            parts = {read: read(start, start + share + width) for read, start in heads.items()}
            parts = {read: part for read, part in parts.items() if len(part[0])}
            if not parts:
                return
            # Whichever run's share ends first ends the block, together with the values of that
            # quotient. Beyond their own shares the others hold fewer than a width of those.
            last = min(int(values[:share][-1]) for values, _ in parts.values())
            end = (last // width + 1) * width
            stops = {read: int(np.searchsorted(values, end)) for read, (values, _) in parts.items()}
            heads = {read: heads[read] + stop for read, stop in stops.items()}
            yield merge_counts(
                [
                    (values[:stop], counts[:stop])
                    for (values, counts), stop in zip(parts.values(), stops.values(), strict=True)
                ]
            )

    def close(self) -> None:
        """Remove what was written."""
        self._scratch.close()

    def _spill(self) -> None:
        values, counts = count_distinct(self._buffer[: self._held])
        self._held = 0
        places = self._scratch.append(values), self._scratch.append(counts)
        self._runs.append(functools.partial(self._read, *places, len(values)))

    def _read(self, values: int, counts: int, length: int, start: int, stop: int) -> Counts:
        """Positions ``start .. stop`` of the run whose arrays lie at ``values``, ``counts``."""
        size = max(0, min(stop, length) - start)
        return (
            self._scratch.read(values + 8 * start, size, np.int64),
            self._scratch.read(counts + 4 * start, size, np.uint32),
        )


class _Scratch:
    """Arrays in one temporary file, created with the first of them.

    The file has no name, so nothing of it stays behind even if the process is killed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self._folder = folder
        self._file: Any = None
        self._size = 0

    def append(self, array: np.ndarray) -> int:
        """Write an array and return the byte where it starts. Raises ``DataError``."""
        folder = self._folder
        try:
            folder = tempfile.gettempdir() if folder is None else folder
            if self._file is None:
                # Without a buffer of its own: one that cannot be flushed cannot be closed either.
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self._file.seek(self._size)
            rest = array.view(np.uint8)
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"cannot write {array.nbytes:,} bytes of n-gram counts, after {self._size:,}, to "
                f"the temporary folder {folder} ({error.strerror or error}); free space there, "
                "choose another folder as scratch, or raise memory_bytes"
            ) from error
        start, self._size = self._size, self._size + array.nbytes
        return start

    def read(self, start: int, size: int, dtype: Any) -> np.ndarray:
        """``size`` numbers from the byte ``start`` on."""
        array = np.empty(size, dtype)
        self._file.seek(start)
        rest = array.view(np.uint8)
        while len(rest):
            rest = rest[self._file.readinto(rest) :]
        return array

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
