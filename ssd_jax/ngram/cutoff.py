"""Which n-grams of one order stay when there are too many."""

from __future__ import annotations

import dataclasses

import numpy as np

from ssd_jax.ngram.runs import Counts

_HIGHEST = 2**32 - 1  # of a count


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds on one order.

    Attributes:
      min_count: the lowest count kept.
      max_ngrams: how many are kept at most; None for any number.
    """

    min_count: int = 1
    max_ngrams: int | None = None


def ranks(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The order in which n-grams are kept, as uint64: by count, then by share of the context.

    Args:
      counts: ``[G]`` uint32, of the n-grams.
      totals: ``[G]`` uint32, of their contexts. Among equal counts a lower one is a larger share.
    """
    return (counts.astype(np.uint64) << np.uint64(32)) + (np.uint32(_HIGHEST) - totals)


class Cutoff:
    """Decides which n-grams stay within ``limits``, given how many there are of each rank.

    To cut exactly, some of the n-grams that tie for the last places must go: the first ones fed
    to :meth:`keep`, which therefore has to see every n-gram once, in ascending order.

    Args:
      limits: the bounds.
      ranked: the distinct ranks of all n-grams and how many share each; not looked at where
        ``limits.max_ngrams`` is None. Rank 0 is for those that must not stay.
    """

    def __init__(self, limits: Limits, ranked: Counts):
        self._lowest = min(limits.min_count, _HIGHEST) << 32  # rank that stays
        self._surplus = 0  # n-grams of that rank that have yet to go
        if limits.max_ngrams is None:
            return
        values, frequencies = ranked
        better = np.cumsum(frequencies[::-1], dtype=np.int64)[::-1] - frequencies
        # The lowest rank that has any place left once all better ones are in. Without a place
        # at all, that is the best rank, all of which goes.
        last = min(int(np.sum(better >= limits.max_ngrams)), len(values) - 1)
        if last >= 0 and int(values[last]) >= self._lowest:
            self._lowest = int(values[last])
            room = limits.max_ngrams - int(better[last])
            self._surplus = max(0, int(frequencies[last]) - room)

    def keep(self, ranks: np.ndarray) -> np.ndarray:
        """Bool ``[G]``: which of the next n-grams stay."""
        stays = ranks >= np.uint64(self._lowest)
        if self._surplus:
            ties = np.flatnonzero(ranks == np.uint64(self._lowest))[: self._surplus]
            stays[ties] = False
            self._surplus -= len(ties)
        return stays
