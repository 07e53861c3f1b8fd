"""The Katz model on the host: fit, probabilities, perplexity, pruning."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ssd_jax.errors import CheckpointError, ConfigError, DataError
from ssd_jax.ngram.counting import MAX_VOCAB_SIZE, count_ngrams, trigrams
from ssd_jax.ngram.file import DamageError, read_orders, write_orders
from ssd_jax.ngram.levels import Level, Order, find_keys, new_level
from ssd_jax.ngram.tables import NGramTables, compile_tables


class KatzModel:
    """A Katz back-off trigram model on the host. Made by :meth:`fit` or :meth:`load`.

    Attributes:
      vocab_size: V, at most 65536.
    """

    def __init__(self, orders: Iterable[Order]):
        self._levels: list[Level] = []
        for order in orders:
            self._levels.append(new_level(order, self._levels[-1] if self._levels else None))
        self.vocab_size: int = self._levels[0].order.vocab_size

    @classmethod
    def fit(
        cls,
        documents: Iterable[Any],
        vocab_size: int,
        *,
        min_trigram_count: int = 1,
        max_trigrams: int | None = None,
        chunk_tokens: int = 1 << 21,
    ) -> KatzModel:
        """Count ``documents`` and estimate Katz's model.

        Args:
          documents: 1-D integer arrays (or lists), read once; no n-gram crosses documents.
          vocab_size: V.
          min_trigram_count, max_trigrams: see :meth:`prune`.
          chunk_tokens: tokens counted at a time. Besides the documents themselves, memory is
            some 200 bytes for each of these plus some 100 for each distinct n-gram, however
            long the text.

        Raises:
          ConfigError: ``vocab_size`` is not in 1 .. 65536, or a bound is out of range.
          DataError: a document is not 1-D, not integer, or holds a token outside ``[0, V)``.
        """
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size {vocab_size} is outside 1 .. {MAX_VOCAB_SIZE}; "
                "an n-gram stage needs a smaller vocabulary, or leave it out"
            )
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
        _check_cutoff(min_trigram_count, max_trigrams)
        unigrams, bigrams, trigrams = count_ngrams(documents, vocab_size, chunk_tokens)
        keep = _cutoff(trigrams, min_trigram_count, max_trigrams)
        return cls([unigrams, bigrams, trigrams.prune(keep)])

    def prune(self, *, min_trigram_count: int = 1, max_trigrams: int | None = None) -> KatzModel:
        """A smaller model: rare trigrams are treated as unseen.

        Their mass goes to the back-off of their context (Katz's cut-off), and the discounts of
        the full counts stay, so every context still sums to 1. A file takes 3 bytes for each
        n-gram and 9 for each context, and a little more where counts exceed 254.

        Args:
          min_trigram_count: the lowest count kept.
          max_trigrams: keep at most so many, those of the highest counts; among equal counts
            those with the largest share of their context.

        Raises:
          ConfigError: ``min_trigram_count`` is below 1 or ``max_trigrams`` below 0.
        """
        _check_cutoff(min_trigram_count, max_trigrams)
        unigrams, bigrams, trigrams = (level.order for level in self._levels)
        keep = _cutoff(trigrams, min_trigram_count, max_trigrams)
        return KatzModel([unigrams, bigrams, trigrams.prune(keep)])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of distinct unigrams, bigrams and trigrams held."""
        unigrams, bigrams, trigrams = (len(level.order.ngrams) for level in self._levels)
        return unigrams, bigrams, trigrams

    def log_probs(self, a: int, b: int) -> np.ndarray:
        """Distribution of the token after ``a, b``, as float64 log-probabilities ``[V]``.

        All are finite. ``a = -1``: the token after ``b`` at the start of a text; ``b = -1``: the
        first token.

        Raises:
          DataError: ``a`` or ``b`` is outside ``-1 .. V - 1``.
        """
        size = self.vocab_size
        if not (-1 <= a < size and -1 <= b < size):
            raise DataError(f"context ({a}, {b}) holds a token outside -1 .. {size - 1}")
        probabilities = np.full(size, 1.0 / size)
        for level, key in zip(self._levels, _context_keys(a, b, size), strict=True):
            row, found = find_keys(level.order.keys, key)
            if found:
                seen = slice(level.order.offsets[row], level.order.offsets[row + 1])
                probabilities *= level.backoff[row]
                probabilities[level.order.ngrams[seen] % size] = level.probabilities[seen]
        return np.log(probabilities)

    def perplexity(self, documents: Iterable[Any]) -> float:
        """``exp`` of the mean negative log-probability of a token.

        Each token is predicted from its (up to two) predecessors in its document.

        Raises:
          DataError: there is no token, or a document is one that :meth:`fit` refuses.
        """
        total, count = 0.0, 0
        for a, b, c in trigrams(documents, self.vocab_size, 1 << 20):
            known = c >= 0
            total += np.log(self._probabilities(a[known], b[known], c[known])).sum()
            count += int(known.sum())
        if not count:
            raise DataError("perplexity needs at least one token; pass non-empty documents")
        return float(np.exp(-total / count))

    def _probabilities(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """``P(c | a, b)`` for int64 arrays of one shape."""
        probabilities = np.full(c.shape, 1.0 / self.vocab_size)
        for level, keys in zip(self._levels, _context_keys(a, b, self.vocab_size), strict=True):
            row, found = find_keys(level.order.keys, keys)
            probabilities[found] *= level.backoff[row[found]]
            entry, seen = find_keys(level.order.ngrams, keys * self.vocab_size + c)
            probabilities[seen] = level.probabilities[entry[seen]]
        return probabilities

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as one safetensors file, replacing ``path`` in one step.

        Counts are stored, not probabilities: the loaded model computes the same ones.
        """
        write_orders(path, [level.order for level in self._levels])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KatzModel:
        """Read what :meth:`save` wrote.

        Raises:
          CheckpointError: the file is missing, damaged or of another format.
        """
        try:
            return cls(read_orders(path))
        except DamageError as error:
            raise CheckpointError(
                f"cannot use n-gram file {path}: {error}; copy it again, or refit the model"
            ) from error

    def tables(self, branch: int) -> NGramTables:
        """Compile the best ``branch`` continuations of every context for the device.

        Raises:
          ConfigError: ``branch`` is below 1.
        """
        if branch < 1:
            raise ConfigError(f"branch must be at least 1, not {branch}")
        return compile_tables(self._levels, branch)


def _context_keys(a: Any, b: Any, vocab_size: int) -> tuple[Any, Any, Any]:
    """Context of each order as a key; -1, which matches none, where a token is missing."""
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    known = (a >= 0) & (b >= 0)
    return np.zeros_like(b), b, np.where(known, a * vocab_size + b, -1)


def _check_cutoff(min_count: int, max_ngrams: int | None) -> None:
    if min_count < 1:
        raise ConfigError(f"min_trigram_count must be at least 1, not {min_count}")
    if max_ngrams is not None and max_ngrams < 0:
        raise ConfigError(f"max_trigrams must be at least 0, not {max_ngrams}")


def _cutoff(order: Order, min_count: int, max_ngrams: int | None) -> np.ndarray:
    """Bool ``[G]``: the n-grams that stay."""
    keep = order.counts >= min_count
    if max_ngrams is not None and max_ngrams < keep.sum():
        shares = order.counts / order.totals[order.rows]
        rarest = np.lexsort((shares, order.counts))[: len(keep) - max_ngrams]
        keep[rarest] = False
    return keep
