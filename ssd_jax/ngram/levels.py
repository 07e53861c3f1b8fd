"""The n-grams of one order, and Katz's probabilities over them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssd_jax.ngram import cutoff

_BLOCK = 1 << 17  # n-grams for which intermediate results are held at a time


@dataclasses.dataclass(frozen=True)
class Order:
    """Counts of the n-grams of one order, in rows by context (CSR).

    Takes 12 bytes for each n-gram and 20 for each context.

    Attributes:
      rank: tokens in a context: 0 for unigrams, 2 for trigrams.
      vocab_size: V.
      keys: ``[R]`` int64, contexts, ascending; the unigrams have the one context 0.
      offsets: ``[R + 1]`` int64, first n-gram of each row.
      ngrams: ``[G]`` int64, ``key * V + token``, ascending.
      counts: ``[G]`` uint32, positive.
      totals: ``[R]`` uint32, n-grams counted in the context, those since pruned included.
      discounts: ``[k]`` float64; none while n-grams are still being counted.
    """

    rank: int
    vocab_size: int
    keys: np.ndarray
    offsets: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    discounts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """``[R]``, distinct continuations held of each context."""
        return np.diff(self.offsets)

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

    def blocks(self) -> Iterator[tuple[Order, slice]]:
        """The order in parts of whole rows, about 100,000 n-grams each, and the rows."""
        for rows in cut_rows(self.offsets, _BLOCK):
            own = slice(self.offsets[rows.start], self.offsets[rows.stop])
            part = dataclasses.replace(
                self,
                keys=self.keys[rows],
                offsets=self.offsets[rows.start : rows.stop + 1] - own.start,
                ngrams=self.ngrams[own],
                counts=self.counts[own],
                totals=self.totals[rows],
            )
            yield part, rows

    def discounted(self, entries: Any) -> np.ndarray:
        """Float64, ``d_r r`` of the counts ``r`` at ``entries``, any index into ``[G]``."""
        counts, highest = self.counts[entries], len(self.discounts)
        low = np.minimum(counts, highest) - 1
        return counts * np.where(counts <= highest, self.discounts[low], 1.0)

    def classes(self, counts: np.ndarray) -> np.ndarray:
        """Sum ``counts`` (``[G]``, positive) by row.

        Returns float64 ``[R, k + 1]``: column ``r`` holds how often the count ``r`` occurs,
        column 0 the total of the counts above ``k``. All entries are integers, so the
        difference of two such tables is exact.
        """
        columns = len(self.discounts) + 1
        low = counts < columns
        rows = np.repeat(np.arange(len(self.keys)), self.lengths)
        cells = rows * columns + np.where(low, counts, 0)
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

    def ranks(self, lower: Order | None) -> np.ndarray:
        """``[G]`` uint64, see :func:`cutoff.ranks`; 0 where the suffix is not in ``lower``.

        Back-off needs the suffix: an n-gram cannot outlive it. None says that none is missing.
        """
        ranks = cutoff.ranks(self.counts, np.repeat(self.totals, self.lengths))
        if lower is not None:
            _, found = find_keys(lower.ngrams, self.suffix_ngrams)
            ranks[~found] = 0
        return ranks

    def prune(self, keep: np.ndarray) -> Order:
        """Without the n-grams where ``keep`` ``[G]`` is False; totals and discounts stay."""
        lengths = np.diff(row_offsets(keep)[self.offsets])
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


def cut_rows(offsets: np.ndarray, size: int) -> list[slice]:
    """Rows in groups that hold about ``size`` entries; ``offsets`` ``[R + 1]`` as in Order."""
    starts = np.searchsorted(offsets, np.arange(size, offsets[-1], size), side="right") - 1
    cuts = np.unique(np.concatenate([[0], starts, [len(offsets) - 1]])).tolist()
    return [slice(*cut) for cut in itertools.pairwise(cuts)]


def find_keys(haystack: np.ndarray, needles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each needle in the ascending ``haystack``, and whether it is there."""
    if not len(haystack):
        return np.zeros(np.shape(needles), np.int64), np.zeros(np.shape(needles), bool)
    index = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return index, haystack[index] == needles


def new_order(rank: int, vocab_size: int, ngrams: np.ndarray, counts: np.ndarray) -> Order:
    """Rows of ascending n-grams and their uint32 counts, without discounts."""
    if rank == 0:  # one context, even if no token was seen
        keys, offsets = np.zeros(1, np.int64), np.array([0, len(ngrams)])
    else:
        contexts = ngrams // vocab_size
        first = np.flatnonzero(np.diff(contexts, prepend=-1))
        keys, offsets = contexts[first], np.append(first, len(ngrams))
    totals = row_sums(counts, offsets).astype(np.uint32)
    return Order(rank, vocab_size, keys, offsets, ngrams, counts, totals, np.zeros(0))


def join(parts: list[Order], discounts: np.ndarray) -> Order:
    """One order from one or more, whose contexts ascend from part to part."""
    rank, vocab_size = parts[0].rank, parts[0].vocab_size
    keys, lengths, ngrams, counts, totals = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("keys", "lengths", "ngrams", "counts", "totals")
    )
    return Order(rank, vocab_size, keys, row_offsets(lengths), ngrams, counts, totals, discounts)


@dataclasses.dataclass(frozen=True)
class Level:
    """One order with its probabilities.

    Takes 28 bytes for each context besides those of the order.

    Attributes:
      order: the counts.
      parents: ``[R]`` int32, row of each context's suffix in the level below.
      left: ``[R]`` float64, mass of the unseen continuations, in counts.
      norms: ``[R]`` float64, mass of all continuations, in counts.
      backoff: ``[R]`` float64, ``alpha``.
    """

    order: Order
    parents: np.ndarray
    left: np.ndarray
    norms: np.ndarray
    backoff: np.ndarray

    def probabilities(self, entries: Any, rows: np.ndarray | int) -> np.ndarray:
        """Float64, of the seen n-grams at ``entries``, any index into ``[G]``, in their rows."""
        return self.order.discounted(entries) / self.norms[rows]


def new_level(order: Order, below: Level | None) -> Level:
    """Katz's back-off weights of one order.

    Nothing is formed as "1 minus what was seen": where a context has seen nearly all of its
    suffix's mass, as is common, that would leave little but rounding error in ``alpha``.
    """
    parents = np.zeros(len(order.keys), np.int32)
    left, norms, backoff = (np.zeros(len(order.keys)) for _ in range(3))
    suffix_classes = None if below is None else _classes(below.order)
    for part, rows in order.blocks():
        classes, lengths = part.classes(part.counts), part.lengths
        full = lengths == order.vocab_size
        mass = part.freed(classes) + part.pruned_mass
        left[rows] = np.where(full, 0.0, np.where(mass == 0.0, 1.0, mass))
        norms[rows] = part.kept(classes) + left[rows]
        if below is None or suffix_classes is None:
            unseen = (order.vocab_size - lengths) / order.vocab_size
        else:
            parents[rows], unseen = _unseen_mass(part, below, suffix_classes)
        np.divide(left[rows] / norms[rows], unseen, out=backoff[rows], where=~full)
    return Level(order, parents, left, norms, backoff)


def _classes(order: Order) -> np.ndarray:
    """:meth:`Order.classes` of an order's own counts, block by block."""
    classes = np.zeros((len(order.keys), len(order.discounts) + 1))
    for part, rows in order.blocks():
        classes[rows] = part.classes(part.counts)
    return classes


def _unseen_mass(
    order: Order, below: Level, suffix_classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row of each context's suffix, and the mass the suffix gives to tokens unseen here.

    Whatever was seen here was also seen after the suffix, so that mass is what belongs to
    the tokens seen after the suffix only, plus all that the suffix itself backs off.
    """
    lower = below.order
    parents, _ = find_keys(lower.keys, order.suffix_keys)
    entries, _ = find_keys(lower.ngrams, order.suffix_ngrams)
    only_there = lower.kept(suffix_classes[parents] - order.classes(lower.counts[entries]))
    return parents, (only_there + below.left[parents]) / below.norms[parents]
