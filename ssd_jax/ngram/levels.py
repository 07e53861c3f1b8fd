"""The n-grams of one order, and Katz's probabilities over them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ssd_jax.ngram.discounts import katz_discounts


@dataclasses.dataclass(frozen=True)
class Order:
    """Counts of the n-grams of one order, in rows by context (CSR).

    Attributes:
      rank: tokens in a context: 0 for unigrams, 2 for trigrams.
      vocab_size: V.
      keys: ``[R]`` int64, contexts, ascending; the unigrams have the one context 0.
      offsets: ``[R + 1]`` int64, first n-gram of each row.
      ngrams: ``[G]`` int64, ``key * V + token``, ascending.
      counts: ``[G]`` int64, positive.
      totals: ``[R]`` int64, n-grams counted in the context, those since pruned included.
      discounts: ``[k]`` float64.
    """

    rank: int
    vocab_size: int
    keys: np.ndarray
    offsets: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    discounts: np.ndarray

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """``[R]``, distinct continuations seen in each context."""
        return np.diff(self.offsets)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """``[G]``, the row of each n-gram."""
        return np.repeat(np.arange(len(self.keys)), self.lengths)

    @property
    def suffix_keys(self) -> np.ndarray:
        """``[R]``, each context without its first token, as a key of the order below."""
        return self.keys % self.vocab_size ** (self.rank - 1)

    @property
    def suffix_ngrams(self) -> np.ndarray:
        """``[G]``, each n-gram without its first token, as an n-gram of the order below."""
        return self.ngrams % self.vocab_size**self.rank

    @property
    def pruned_mass(self) -> np.ndarray:
        """``[R]`` int64, how many of ``totals`` belong to pruned n-grams."""
        return self.totals - row_sums(self.counts, self.offsets)

    @property
    def discounted(self) -> np.ndarray:
        """``[G]`` float64, ``d_r r`` of every count ``r``."""
        low = np.minimum(self.counts, len(self.discounts)) - 1
        return self.counts * np.where(self.counts <= len(self.discounts), self.discounts[low], 1.0)

    def classes(self, counts: np.ndarray) -> np.ndarray:
        """Sum ``counts`` (``[G]``, positive) by row.

        Returns float64 ``[R, k + 1]``: column ``r`` holds how often the count ``r`` occurs,
        column 0 the total of the counts above ``k``. All entries are integers, so the
        difference of two such tables is exact.
        """
        columns = len(self.discounts) + 1
        low = counts < columns
        cells = self.rows * columns + np.where(low, counts, 0)
        sums = np.bincount(cells, np.where(low, 1, counts), minlength=len(self.keys) * columns)
        return sums.reshape(len(self.keys), columns)

    def kept(self, classes: np.ndarray) -> np.ndarray:
        """``[R]``, discounted total of the entries summed up in ``classes``."""
        r = np.arange(1, len(self.discounts) + 1)
        return classes[:, 0] + (classes[:, 1:] * (self.discounts * r)).sum(axis=1)

    def freed(self, classes: np.ndarray) -> np.ndarray:
        """``[R]``, what the discounts take from the entries summed up in ``classes``."""
        r = np.arange(1, len(self.discounts) + 1)
        return (classes[:, 1:] * ((1.0 - self.discounts) * r)).sum(axis=1)

    def prune(self, keep: np.ndarray) -> Order:
        """Without the n-grams where ``keep`` ``[G]`` is False; totals and discounts stay."""
        lengths = np.bincount(self.rows[keep], minlength=len(self.keys))
        stays = lengths > 0
        return dataclasses.replace(
            self,
            keys=self.keys[stays],
            offsets=row_offsets(lengths[stays]),
            ngrams=self.ngrams[keep],
            counts=self.counts[keep],
            totals=self.totals[stays],
        )


def row_offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(row_offsets(values)[offsets])


def find_keys(haystack: np.ndarray, needles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each needle in the ascending ``haystack``, and whether it is there."""
    if not len(haystack):
        return np.zeros(np.shape(needles), np.int64), np.zeros(np.shape(needles), bool)
    index = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return index, haystack[index] == needles


def new_order(rank: int, vocab_size: int, ngrams: np.ndarray, counts: np.ndarray) -> Order:
    """Rows and discounts of ascending n-grams."""
    contexts = ngrams // vocab_size
    first = np.flatnonzero(np.diff(contexts, prepend=-1))
    keys, offsets = contexts[first], np.append(first, len(ngrams))
    if rank == 0:  # one context, even if no token was seen
        keys, offsets = np.zeros(1, np.int64), np.array([0, len(ngrams)])
    totals = row_sums(counts, offsets)
    discounts = katz_discounts(*np.unique(counts, return_counts=True))
    return Order(rank, vocab_size, keys, offsets, ngrams, counts, totals, discounts)


@dataclasses.dataclass(frozen=True)
class Level:
    """One order with its probabilities.

    Attributes:
      order: the counts.
      parents: ``[R]`` row of each context's suffix in the level below.
      left: ``[R]`` float64, mass of the unseen continuations, in counts.
      norms: ``[R]`` float64, mass of all continuations, in counts.
      probabilities: ``[G]`` float64, of the seen n-grams.
      backoff: ``[R]`` float64, ``alpha``.
    """

    order: Order
    parents: np.ndarray
    left: np.ndarray
    norms: np.ndarray
    probabilities: np.ndarray
    backoff: np.ndarray


def new_level(order: Order, below: Level | None) -> Level:
    """Katz's probabilities and back-off weights of one order.

    Nothing is formed as "1 minus what was seen": where a context has seen nearly all of its
    suffix's mass, as is common, that would leave little but rounding error in ``alpha``.
    """
    classes = order.classes(order.counts)
    full = order.lengths == order.vocab_size
    left = order.freed(classes) + order.pruned_mass
    left = np.where(full, 0.0, np.where(left == 0.0, 1.0, left))
    norms = order.kept(classes) + left
    if below is None:
        parents = np.zeros(len(order.keys), np.int64)
        unseen = (order.vocab_size - order.lengths) / order.vocab_size
    else:
        parents, unseen = _unseen_mass(order, below)
    backoff = np.divide(left / norms, unseen, out=np.zeros(len(left)), where=~full)
    return Level(order, parents, left, norms, order.discounted / norms[order.rows], backoff)


def _unseen_mass(order: Order, below: Level) -> tuple[np.ndarray, np.ndarray]:
    """Row of each context's suffix, and the mass the suffix gives to tokens unseen here.

    Whatever was seen here was also seen after the suffix, so that mass is what belongs to
    the tokens seen after the suffix only, plus all that the suffix itself backs off.
    """
    lower = below.order
    parents, _ = find_keys(lower.keys, order.suffix_keys)
    entries, _ = find_keys(lower.ngrams, order.suffix_ngrams)
    in_suffix = lower.classes(lower.counts)[parents]
    only_there = lower.kept(in_suffix - order.classes(lower.counts[entries]))
    return parents, (only_there + below.left[parents]) / below.norms[parents]
