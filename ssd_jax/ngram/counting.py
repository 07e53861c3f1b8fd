"""Counting n-grams of long texts in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ssd_jax.errors import DataError
from ssd_jax.ngram.levels import Order, new_order, row_sums

MAX_VOCAB_SIZE = 65536  # a * V + b must fit in uint32
_END = np.array([-1], np.int64)  # follows every document


def _pieces(documents: Iterable[Any], vocab_size: int, size: int) -> Iterator[np.ndarray]:
    """Checked documents as int64 pieces of at most ``size`` tokens, ``-1`` after each document.

    Raises:
      DataError: a document is not a 1-D integer array or holds a token outside ``[0, V)``.
    """
    for index, document in enumerate(documents):
        tokens = np.asarray(document)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError(
                f"document {index} has shape {tokens.shape} and type {tokens.dtype}; "
                "pass a sequence of 1-D integer arrays"
            )
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise DataError(
                f"document {index} holds tokens from {tokens.min()} to {tokens.max()}, "
                f"outside 0 .. {vocab_size - 1}; use the tokenizer this model is meant for"
            )
        for start in range(0, len(tokens), size):
            yield tokens[start : start + size].astype(np.int64)
        yield _END


def trigrams(
    documents: Iterable[Any], vocab_size: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every token ``c`` with its predecessors ``a, b``, -1 where the document has none.

    Yields three int64 arrays of equal length, about ``size`` and at most ``2 size`` long. The
    ends of documents (``c == -1``) are among them, and ``a`` may lie before such an end where
    ``b`` is -1.
    """
    pending, held = [_END, _END], 0
    for piece in itertools.chain(_pieces(documents, vocab_size, size), [None]):
        if piece is not None:
            pending.append(piece)
            held += len(piece)
        if held >= size or piece is None:
            stream = np.concatenate(pending)
            yield stream[:-2], stream[1:-1], stream[2:]
            pending, held = [stream[-2:]], 0


class _Tally:
    """Counts integers fed in batches; holds O(distinct) numbers, each merged O(log) times."""

    def __init__(self):
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray) -> None:
        self._runs.append(np.unique(values, return_counts=True))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values, ascending, and their counts, both int64."""
        while len(self._runs) > 1:
            self._merge()
        return self._runs[0]

    def _merge(self) -> None:
        (x, x_counts), (y, y_counts) = self._runs.pop(), self._runs.pop()
        values, counts = np.concatenate([x, y]), np.concatenate([x_counts, y_counts])
        order = np.argsort(values, kind="stable")
        values = values[order]
        first = np.flatnonzero(np.diff(values, prepend=-1))
        self._runs.append((values[first], row_sums(counts[order], np.append(first, len(values)))))


def count_ngrams(documents: Iterable[Any], vocab_size: int, chunk_tokens: int) -> list[Order]:
    tallies = [_Tally() for _ in range(3)]
    for a, b, c in trigrams(documents, vocab_size, chunk_tokens):
        known = c >= 0
        tallies[0].add(c[known])
        known &= b >= 0
        tallies[1].add((b * vocab_size + c)[known])
        known &= a >= 0
        tallies[2].add(((a * vocab_size + b) * vocab_size + c)[known])
    return [new_order(rank, vocab_size, *tally.result()) for rank, tally in enumerate(tallies)]
