"""The Katz model on the host: fit, probabilities, perplexity, pruning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ssd_jax.errors import CheckpointError, ConfigError, DataError
from ssd_jax.ngram.counting import MAX_VOCAB_SIZE, count_ngrams, token_triples
from ssd_jax.ngram.cutoff import Cutoff, Limits
from ssd_jax.ngram.file import DamageError, read_orders, write_orders
from ssd_jax.ngram.levels import Level, Order, find_keys, new_level
from ssd_jax.ngram.runs import count_distinct
from ssd_jax.ngram.tables import NGramTables, compile_tables, rank


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
        max_bigrams: int | None = None,
        min_trigram_count: int = 1,
        max_trigrams: int | None = None,
        memory_bytes: int = 1 << 30,
        scratch: str | os.PathLike[str] | None = None,
    ) -> KatzModel:
        """Count ``documents`` and estimate Katz's model.

        The result is that of :meth:`prune` on the model of all n-grams, which need not fit into
        memory. However long the text, ``fit`` takes at most ``memory_bytes`` plus 25 bytes for
        each n-gram and 70 for each context that it keeps, and some 30 MB; the documents come on
        top, unless they are generated.

        Args:
          documents: 1-D integer arrays (or lists), read once; no n-gram crosses documents.
          vocab_size: V.
          max_bigrams, min_trigram_count, max_trigrams: see :meth:`prune`.
          memory_bytes: for counting. A text below ``memory_bytes / 56`` tokens is counted in
            memory, a longer one in parts that are written to ``scratch``: at most 24 bytes a
            token, some 5 to 10 with natural text.
          scratch: folder of two temporary files, which have no name and never outlive the call;
            None for the system's temporary folder.

        Raises:
          ConfigError: ``vocab_size`` is not in 1 .. 65536, or a bound is out of range.
          DataError: a document is not 1-D, not integer, or holds a token outside ``[0, V)``;
            there are 2**32 tokens or more; or ``scratch`` cannot be written, or is full.
        """
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size {vocab_size} is outside 1 .. {MAX_VOCAB_SIZE}; "
                "an n-gram stage needs a smaller vocabulary, or leave it out"
            )
        if memory_bytes < 1:
            raise ConfigError(f"memory_bytes must be at least 1, not {memory_bytes}")
        limits = _limits(max_bigrams, min_trigram_count, max_trigrams)
        return cls(count_ngrams(documents, vocab_size, limits, memory_bytes, scratch))

    def prune(
        self,
        *,
        max_bigrams: int | None = None,
        min_trigram_count: int = 1,
        max_trigrams: int | None = None,
    ) -> KatzModel:
        """A smaller model: rare bigrams and trigrams are treated as unseen.

        Their mass goes to the back-off of their context (Katz's cut-off), and the discounts of
        the full counts stay, so every context still sums to 1. A file takes 3 bytes for each
        n-gram and 9 for each context, and a little more where counts exceed 254.

        Args:
          max_bigrams: keep at most so many, those of the highest counts; among equal counts
            those with the largest share of their context. Trigrams that end in a bigram dropped
            are dropped too.
          min_trigram_count: the lowest count kept.
          max_trigrams: as ``max_bigrams``, of the trigrams that are left.

        Raises:
          ConfigError: ``min_trigram_count`` is below 1, or another bound below 0.
        """
        limits = _limits(max_bigrams, min_trigram_count, max_trigrams)
        orders, pruned = [self._levels[0].order], None
        for level, bounds in zip(self._levels[1:], limits, strict=True):
            ranks = level.order.ranks(pruned)
            cutoff = Cutoff(bounds, count_distinct(ranks.copy()))
            orders.append(level.order.prune(cutoff.keep(ranks)))
            pruned = None if bounds.max_ngrams is None else orders[-1]
        return KatzModel(orders)

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
                probabilities[level.order.ngrams[seen] % size] = level.probabilities(seen, row)
        return np.log(probabilities)

    def perplexity(self, documents: Iterable[Any]) -> float:
        """``exp`` of the mean negative log-probability of a token.

        Each token is predicted from its (up to two) predecessors in its document.

        Raises:
          DataError: there is no token, or a document is one that :meth:`fit` refuses.
        """
        total, count = 0.0, 0
        for a, b, c in self._triples(documents):
            total += np.log(self._probabilities(a, b, c)).sum()
            count += len(c)
        if not count:
            raise DataError("perplexity needs at least one token; pass non-empty documents")
        return float(np.exp(-total / count))

    def hit_rates(self, documents: Iterable[Any], branch: int) -> np.ndarray:
        """How often the next token is among the likeliest, as :meth:`tables` ranks them.

        Each token is predicted from its (up to two) predecessors in its document.

        Returns:
          float64 ``[branch]``: at ``i`` the share of tokens among the best ``i + 1``.

        Raises:
          ConfigError: ``branch`` is below 1.
          DataError: there is no token, or a document is one that :meth:`fit` refuses.
        """
        _check_branch(branch)
        kept = min(branch, self.vocab_size)
        tables = [ranking.tokens[ranking.best(kept)] for ranking in rank(self._levels, kept)]
        hits, count = np.zeros(branch), 0
        for a, b, c in self._triples(documents):
            best = np.empty((len(c), kept), np.int32)
            keys = _context_keys(a, b, self.vocab_size)
            for level, table, key in zip(self._levels, tables, keys, strict=True):
                row, found = find_keys(level.order.keys, key)
                best[found] = table[row[found]]
            hits[:kept] += (best == c[:, None]).sum(axis=0)
            count += len(c)
        if not count:
            raise DataError("hit rates need at least one token; pass non-empty documents")
        return np.cumsum(hits) / count

    def _triples(self, documents: Iterable[Any]) -> Iterator[tuple[np.ndarray, ...]]:
        """Each token ``c`` with its predecessors ``a, b`` (-1: none), some 100,000 at a time."""
        for a, b, c in token_triples(documents, self.vocab_size, 1 << 17):
            known = c >= 0
            yield a[known], b[known], c[known]

    def _probabilities(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """``P(c | a, b)`` for int64 arrays of one shape."""
        probabilities = np.full(c.shape, 1.0 / self.vocab_size)
        for level, keys in zip(self._levels, _context_keys(a, b, self.vocab_size), strict=True):
            row, found = find_keys(level.order.keys, keys)
            probabilities[found] *= level.backoff[row[found]]
            entry, seen = find_keys(level.order.ngrams, keys * self.vocab_size + c)
            probabilities[seen] = level.probabilities(entry[seen], row[seen])
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
        _check_branch(branch)
        return compile_tables(self._levels, branch)


def _context_keys(a: Any, b: Any, vocab_size: int) -> tuple[Any, Any, Any]:
    """Context of each order as a key; -1, which matches none, where a token is missing."""
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    known = (a >= 0) & (b >= 0)
    return np.zeros_like(b), b, np.where(known, a * vocab_size + b, -1)


def _check_branch(branch: int) -> None:
    if branch < 1:
        raise ConfigError(f"branch must be at least 1, not {branch}")


def _limits(
    max_bigrams: int | None, min_trigram_count: int, max_trigrams: int | None
) -> tuple[Limits, Limits]:
    """The checked bounds on bigrams and on trigrams."""
    if min_trigram_count < 1:
        raise ConfigError(f"min_trigram_count must be at least 1, not {min_trigram_count}")
    for name, bound in (("max_bigrams", max_bigrams), ("max_trigrams", max_trigrams)):
        if bound is not None and bound < 0:
            raise ConfigError(f"{name} must be at least 0, not {bound}")
    return Limits(1, max_bigrams), Limits(min_trigram_count, max_trigrams)
