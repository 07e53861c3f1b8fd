"""Counting n-grams of long texts in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ssd_jax.errors import DataError
from ssd_jax.ngram.cutoff import Cutoff, Limits
from ssd_jax.ngram.discounts import katz_discounts
from ssd_jax.ngram.levels import Order, join, new_order
from ssd_jax.ngram.runs import Counts, SortedRuns, count_distinct, merge_counts

MAX_VOCAB_SIZE = 65536  # a * V + b must fit in uint32
MAX_TOKENS = 2**32 - 1  # counts are uint32
_PIECE = 1 << 17  # tokens taken from the documents at a time
# Memory for each token in the buffers of SortedRuns: 8 bytes in either, and 33 while one is
# counted next to what the other has counted, 12.
_TOKEN_BYTES = 56
_MERGE_BYTES = 128  # for each n-gram merged at a time, where it is ranked and selected
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


def token_triples(
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


def count_ngrams(
    documents: Iterable[Any],
    vocab_size: int,
    limits: tuple[Limits, Limits],
    memory_bytes: int,
    scratch: str | os.PathLike[str] | None,
) -> list[Order]:
    """The orders of :meth:`KatzModel.fit`; ``limits`` are those on bigrams and on trigrams."""
    capacity = max(1, memory_bytes // _TOKEN_BYTES)
    unigrams, length = np.zeros(vocab_size, np.int64), 0
    with contextlib.ExitStack() as stack:
        bigrams, trigrams = (
            stack.enter_context(contextlib.closing(SortedRuns(capacity, scratch))) for _ in range(2)
        )
        for a, b, c in token_triples(documents, vocab_size, min(capacity, _PIECE)):
            known = c >= 0
            unigrams += np.bincount(c[known], minlength=vocab_size)
            length += int(known.sum())
            if length > MAX_TOKENS:
                raise DataError(
                    f"the text has more than {MAX_TOKENS:,} tokens, so that a count may exceed "
                    "32 bits; fit the model on less text"
                )
            known &= b >= 0
            bigrams.add((b * vocab_size + c)[known])
            known &= a >= 0
            trigrams.add(((a * vocab_size + b) * vocab_size + c)[known])
        bigrams.finish()
        trigrams.finish()
        seen = np.flatnonzero(unigrams)
        counts = unigrams[seen].astype(np.uint32)
        frequencies = count_distinct(counts.copy())
        orders = [join([new_order(0, vocab_size, seen, counts)], _discounts(frequencies))]
        block = max(1, memory_bytes // _MERGE_BYTES)
        pruned = None
        for rank, (runs, bounds) in enumerate(zip((bigrams, trigrams), limits, strict=True), 1):
            orders.append(_merge(rank, vocab_size, runs, block, bounds, pruned))
            pruned = None if bounds.max_ngrams is None else orders[-1]
            runs.close()
        return orders


def _merge(
    rank: int,
    vocab_size: int,
    runs: SortedRuns,
    size: int,
    limits: Limits,
    lower: Order | None,
) -> Order:
    """What ``limits`` leave of one order, merged ``size`` n-grams at a time.

    Its n-grams end in those of ``lower``, if the order below has lost some.
    """
    none = np.zeros(0, np.int64), np.zeros(0, np.uint32)

    def blocks() -> Iterator[Order]:
        for ngrams, counts in runs.blocks(size, vocab_size):
            yield new_order(rank, vocab_size, ngrams, counts)

    ranked = none
    if limits.max_ngrams is not None:
        for block in blocks():
            ranked = merge_counts([ranked, count_distinct(block.ranks(lower))])
    cutoff = Cutoff(limits, ranked)
    kept, frequencies = [new_order(rank, vocab_size, *none)], none
    for block in blocks():
        frequencies = merge_counts([frequencies, count_distinct(block.counts.copy())])
        kept.append(block.prune(cutoff.keep(block.ranks(lower))))
    return join(kept, _discounts(frequencies))


def _discounts(frequencies: Counts) -> np.ndarray:
    """Katz's discounts, given the counts met and how many n-grams have each."""
    counts, numbers = (x.astype(np.int64) for x in frequencies)
    return katz_discounts(counts, numbers)
