"""Katz back-off trigram: fitted and stored on the host, looked up on the device.

The model (S. Katz, "Estimation of probabilities from sparse data for the language model
component of a speech recognizer", 1987). With ``C`` the counts of the order at hand::

    P(c | context) = d_C C(context c) / N(context)       where the n-gram was seen
                   = alpha(context) P(c | shorter)       where it was not

``d_r`` is a Good-Turing discount for ``r <= 5`` and 1 above; ``alpha`` hands the discounted
mass to the unseen continuations. The recursion ends in the uniform distribution, so unigrams
back off like every other order. Two rules the book leaves open, so that every probability is
positive and every context sums to 1: a context that saw all of V keeps its whole mass, and a
context that loses no mass to discounting gives one pseudo-count to its unseen continuations
(as does a corpus without tokens: all its contexts are uniform).

Axes of this module, besides those of the package: R contexts of one order, G distinct n-grams
of one order. An n-gram is one integer, its tokens read as digits in base V.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from ssd_jax.errors import CheckpointError, ConfigError, DataError

MAX_VOCAB_SIZE = 65536  # a * V + b must fit in uint32
MAX_DISCOUNTED = 5  # Katz's k: counts above it are taken as reliable
MIN_DISCOUNT = 0.01  # Katz's formula yields 0, or its rounding noise, where only n_1 is positive
MAX_SLOPE = -1.001  # at -1 the line of simple Good-Turing discounts nothing

# ---------------------------------------------------------------------------- discounts


def good_turing(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """Adjusted counts ``r*`` for ``r = 1 .. highest`` by simple Good-Turing.

    W. Gale and G. Sampson, "Good-Turing frequency estimation without tears", 1995: Turing's
    estimate ``(r + 1) n[r + 1] / n[r]`` for as long as it differs significantly (1.96 standard
    deviations) from the estimate on the fitted line ``log Z_r = slope log r + const``, and the
    line from there on. (Their last step, rescaling all of ``r*``, is left to Katz's factor.)

    Args:
      counts: the distinct counts ``r`` met, ascending integers from 1.
      frequencies: how many n-grams have each of them, ``n_r > 0``.
      highest: the last ``r`` wanted.

    Returns:
      float64 ``[highest]``.
    """
    line = _line_estimate(counts, frequencies, highest)
    n = _dense(counts, frequencies, highest + 1)
    r, here, above = np.arange(1, highest + 1), n[:-1], n[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        turing = (r + 1) * above / here
        deviation = turing * np.sqrt((1 + above / here) / above)
    differs = (here > 0) & (above > 0) & (np.abs(turing - line) > 1.96 * deviation)
    return np.where(np.logical_and.accumulate(differs), turing, line)


def _dense(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """``n_1 .. n_highest`` as float64."""
    n = np.zeros(highest)
    low = counts <= highest
    n[counts[low] - 1] = frequencies[low]
    return n


def _line_estimate(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """Good-Turing ``r*`` on a power law fitted to the counts of counts."""
    slope = np.inf
    if len(counts) > 1:
        below = np.concatenate([[0], counts[:-1]])
        above = np.concatenate([counts[1:], [2 * counts[-1] - counts[-2]]])
        # Spread over the gap to its neighbours, a lone n_r = 1 does not bend the line.
        x, y = np.log(counts), np.log(2.0 * frequencies / (above - below))
        x = x - x.mean()
        slope = (x @ y) / (x @ x)
    if slope > MAX_SLOPE:
        # No line, or one that does not lower counts: assume Zipf's law, n_r about r ** -2.
        slope = -2.0
    r = np.arange(1, highest + 1)
    return r * (1.0 + 1.0 / r) ** (slope + 1.0)


def katz_discounts(
    counts: np.ndarray, frequencies: np.ndarray, highest: int = MAX_DISCOUNTED
) -> np.ndarray:
    """Katz's discounts ``d_1 .. d_highest``, each in ``(0, 1]``.

    ``1 - d_r`` is proportional to ``1 - r* / r``, with the factor that frees exactly the
    Good-Turing mass of the unseen, ``sum_r n_r r (1 - d_r) = n_1``. With plain Turing estimates
    that is Katz's formula; solved like this it also holds for smoothed ones. Where the result
    leaves ``[0.01, 1]`` (too few counts), the same is tried with every ``r*`` from the line, then
    without the factor, which always fits.

    Args:
      counts, frequencies: as in :func:`good_turing`.
      highest: Katz's ``k``.

    Returns:
      float64 ``[highest]``.
    """
    r = np.arange(1, highest + 1)
    n = _dense(counts, frequencies, highest)
    line = _line_estimate(counts, frequencies, highest)
    for adjusted in (good_turing(counts, frequencies, highest), line):
        freed = np.sum(n * (r - adjusted))
        if freed > 0:
            discounts = 1.0 - n[0] / freed * (1.0 - adjusted / r)
            if np.all((discounts >= MIN_DISCOUNT) & (discounts <= 1)):
                return discounts
    return line / r


# --------------------------------------------------------------------- one order of n-grams


@dataclasses.dataclass(frozen=True)
class _Order:
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
        return self.totals - _row_sums(self.counts, self.offsets)

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

    def prune(self, keep: np.ndarray) -> _Order:
        """Without the n-grams where ``keep`` ``[G]`` is False; totals and discounts stay."""
        lengths = np.bincount(self.rows[keep], minlength=len(self.keys))
        stays = lengths > 0
        return dataclasses.replace(
            self,
            keys=self.keys[stays],
            offsets=_offsets(lengths[stays]),
            ngrams=self.ngrams[keep],
            counts=self.counts[keep],
            totals=self.totals[stays],
        )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(_offsets(values)[offsets])


def _find(haystack: np.ndarray, needles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each needle in the ascending ``haystack``, and whether it is there."""
    if not len(haystack):
        return np.zeros(np.shape(needles), np.int64), np.zeros(np.shape(needles), bool)
    index = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return index, haystack[index] == needles


def _new_order(rank: int, vocab_size: int, ngrams: np.ndarray, counts: np.ndarray) -> _Order:
    """Rows and discounts of ascending n-grams."""
    contexts = ngrams // vocab_size
    first = np.flatnonzero(np.diff(contexts, prepend=-1))
    keys, offsets = contexts[first], np.append(first, len(ngrams))
    if rank == 0:  # one context, even if no token was seen
        keys, offsets = np.zeros(1, np.int64), np.array([0, len(ngrams)])
    totals = _row_sums(counts, offsets)
    discounts = katz_discounts(*np.unique(counts, return_counts=True))
    return _Order(rank, vocab_size, keys, offsets, ngrams, counts, totals, discounts)


# ------------------------------------------------------------------- Katz's probabilities


@dataclasses.dataclass(frozen=True)
class _Level:
    """One order with its probabilities.

    Attributes:
      order: the counts.
      parents: ``[R]`` row of each context's suffix in the level below.
      left: ``[R]`` float64, mass of the unseen continuations, in counts.
      norms: ``[R]`` float64, mass of all continuations, in counts.
      probabilities: ``[G]`` float64, of the seen n-grams.
      backoff: ``[R]`` float64, ``alpha``.
    """

    order: _Order
    parents: np.ndarray
    left: np.ndarray
    norms: np.ndarray
    probabilities: np.ndarray
    backoff: np.ndarray


def _new_level(order: _Order, below: _Level | None) -> _Level:
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
    return _Level(order, parents, left, norms, order.discounted / norms[order.rows], backoff)


def _unseen_mass(order: _Order, below: _Level) -> tuple[np.ndarray, np.ndarray]:
    """Row of each context's suffix, and the mass the suffix gives to tokens unseen here.

    Whatever was seen here was also seen after the suffix, so that mass is what belongs to
    the tokens seen after the suffix only, plus all that the suffix itself backs off.
    """
    lower = below.order
    parents, _ = _find(lower.keys, order.suffix_keys)
    entries, _ = _find(lower.ngrams, order.suffix_ngrams)
    in_suffix = lower.classes(lower.counts)[parents]
    only_there = lower.kept(in_suffix - order.classes(lower.counts[entries]))
    return parents, (only_there + below.left[parents]) / below.norms[parents]


# ------------------------------------------------------------------------------- counting

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


def _trigrams(
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
        self._runs.append((values[first], _row_sums(counts[order], np.append(first, len(values)))))


def _count(documents: Iterable[Any], vocab_size: int, chunk_tokens: int) -> list[_Order]:
    tallies = [_Tally() for _ in range(3)]
    for a, b, c in _trigrams(documents, vocab_size, chunk_tokens):
        known = c >= 0
        tallies[0].add(c[known])
        known &= b >= 0
        tallies[1].add((b * vocab_size + c)[known])
        known &= a >= 0
        tallies[2].add(((a * vocab_size + b) * vocab_size + c)[known])
    return [_new_order(rank, vocab_size, *tally.result()) for rank, tally in enumerate(tallies)]


# ------------------------------------------------------------------------------ the model


class KatzModel:
    """A Katz back-off trigram model on the host. Made by :meth:`fit` or :meth:`load`.

    Attributes:
      vocab_size: V, at most 65536.
    """

    def __init__(self, orders: Iterable[_Order]):
        self._levels: list[_Level] = []
        for order in orders:
            self._levels.append(_new_level(order, self._levels[-1] if self._levels else None))
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
        unigrams, bigrams, trigrams = _count(documents, vocab_size, chunk_tokens)
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
            row, found = _find(level.order.keys, key)
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
        for a, b, c in _trigrams(documents, self.vocab_size, 1 << 20):
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
            row, found = _find(level.order.keys, keys)
            probabilities[found] *= level.backoff[row[found]]
            entry, seen = _find(level.order.ngrams, keys * self.vocab_size + c)
            probabilities[seen] = level.probabilities[entry[seen]]
        return probabilities

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as one safetensors file, replacing ``path`` in one step.

        Counts are stored, not probabilities: the loaded model computes the same ones.
        """
        path = Path(path)
        tensors = {}
        for name, level in zip(_ORDER_NAMES, self._levels, strict=True):
            tensors |= {f"{name}.{key}": x for key, x in _to_tensors(level.order).items()}
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "vocab_size": str(self.vocab_size),
            "checksum": _checksum(self.vocab_size, tensors),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(to_safetensors(tensors, metadata))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KatzModel:
        """Read what :meth:`save` wrote.

        Raises:
          CheckpointError: the file is missing, damaged or of another format.
        """
        try:
            return cls(_read(path))
        except _DamageError as error:
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
        return _compile(self._levels, branch)


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


def _cutoff(order: _Order, min_count: int, max_ngrams: int | None) -> np.ndarray:
    """Bool ``[G]``: the n-grams that stay."""
    keep = order.counts >= min_count
    if max_ngrams is not None and max_ngrams < keep.sum():
        shares = order.counts / order.totals[order.rows]
        rarest = np.lexsort((shares, order.counts))[: len(keep) - max_ngrams]
        keep[rarest] = False
    return keep


# -------------------------------------------------------------------------------- the file

_FORMAT, _VERSION = "ssd_jax.katz", "1"
_ORDER_NAMES = ("unigram", "bigram", "trigram")
_DTYPES = {
    "keys": np.uint32,
    "offsets": np.uint32,
    "tokens": np.uint16,
    "counts": np.uint8,
    "large_counts": np.uint32,
    "pruned": np.uint8,
    "large_pruned": np.uint32,
    "discounts": np.float64,
}


class _DamageError(Exception):
    """Why a file cannot be used; :meth:`KatzModel.load` adds its name and the remedy."""


def _require(condition: Any, why: str) -> None:
    if not condition:
        raise _DamageError(why)


def _pack(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small integers as one byte each; 255 stands for the next of the large ones."""
    return np.minimum(values, 255).astype(np.uint8), values[values >= 255].astype(np.uint32)


def _unpack(codes: np.ndarray, large: np.ndarray, what: str) -> np.ndarray:
    escaped = codes == 255
    _require(len(large) == escaped.sum() and np.all(large >= 255), f"{what} do not fit together")
    values = codes.astype(np.int64)
    values[escaped] = large
    return values


def _to_tensors(order: _Order) -> dict[str, np.ndarray]:
    counts, large_counts = _pack(order.counts)
    pruned, large_pruned = _pack(order.pruned_mass)
    return {
        "keys": order.keys.astype(np.uint32),
        "offsets": order.offsets.astype(np.uint32),
        "tokens": (order.ngrams % order.vocab_size).astype(np.uint16),
        "counts": counts,
        "large_counts": large_counts,
        "pruned": pruned,
        "large_pruned": large_pruned,
        "discounts": order.discounts,
    }


def _checksum(vocab_size: int, tensors: dict[str, np.ndarray]) -> str:
    """CRC-32 of everything the file says."""
    crc = zlib.crc32(str(vocab_size).encode())
    for name in sorted(tensors):
        x = tensors[name]
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape} ".encode(), crc)
        crc = zlib.crc32(x.tobytes(), crc)
    return f"{crc:08x}"


def _read(path: str | os.PathLike[str]) -> list[_Order]:
    """The checked orders of a file. Raises ``_DamageError``."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        # The last four: a type that safetensors knows and NumPy does not.
        raise _DamageError(str(error) or type(error).__name__) from error
    _require(metadata.get("format") == _FORMAT, "it is not an n-gram model")
    version = metadata.get("version")
    _require(version == _VERSION, f"it has format version {version}, not {_VERSION}")
    digits = metadata.get("vocab_size", "")
    _require(digits.isdecimal() and len(digits) <= 5, "its vocabulary size is not a number")
    vocab_size = int(digits)
    _require(1 <= vocab_size <= MAX_VOCAB_SIZE, f"its vocabulary size is {vocab_size}")
    checksum = _checksum(vocab_size, tensors)
    _require(metadata.get("checksum") == checksum, "its content does not match its checksum")
    names = {f"{order}.{name}" for order in _ORDER_NAMES for name in _DTYPES}
    odd = sorted(names ^ tensors.keys())
    _require(not odd, f"missing or unexpected tensors {', '.join(odd)}")
    orders: list[_Order] = []
    for rank, name in enumerate(_ORDER_NAMES):
        own = {key: tensors[f"{name}.{key}"] for key in _DTYPES}
        orders.append(_from_tensors(rank, vocab_size, name, own))
        if rank:
            _check_suffixes(orders[rank], orders[rank - 1], name)
    return orders


def _from_tensors(rank: int, vocab_size: int, name: str, x: dict[str, np.ndarray]) -> _Order:
    """The inverse of :func:`_to_tensors`, checked for all that look-ups rely on."""
    for key, dtype in _DTYPES.items():
        _require(
            x[key].dtype == dtype and x[key].ndim == 1,
            f"{name}.{key} is {x[key].dtype}{list(x[key].shape)}, not a row of {dtype.__name__}",
        )
    keys, offsets, tokens = (x[key].astype(np.int64) for key in ("keys", "offsets", "tokens"))
    counts = _unpack(x["counts"], x["large_counts"], f"{name} counts")
    pruned = _unpack(x["pruned"], x["large_pruned"], f"{name} pruned counts")
    sizes = len(offsets) == len(keys) + 1 == len(pruned) + 1 and len(tokens) == len(counts)
    _require(sizes, f"the {name} arrays differ in length")
    _require(offsets[0] == 0 and offsets[-1] == len(tokens), f"{name} offsets miss the ends")
    lengths = np.diff(offsets)
    _require(np.all(lengths > 0 if rank else lengths >= 0), f"{name} offsets are not ascending")
    _require(np.all(np.diff(keys) > 0), f"{name} keys are not ascending")
    _require(np.all(keys < vocab_size**rank), f"{name} keys exceed the vocabulary")
    _require(rank or len(keys) == 1, f"{name} keys are more or less than one")
    _require(np.all(tokens < vocab_size), f"{name} tokens exceed the vocabulary")
    ngrams = np.repeat(keys, lengths) * vocab_size + tokens
    _require(np.all(np.diff(ngrams) > 0), f"{name} tokens are not ascending")
    _require(np.all(counts > 0), f"{name} counts are not positive")
    discounts = x["discounts"]
    proper = len(discounts) == MAX_DISCOUNTED and np.all((discounts > 0) & (discounts <= 1))
    _require(proper, f"{name} discounts are not {MAX_DISCOUNTED} numbers in (0, 1]")
    totals = _row_sums(counts, offsets) + pruned
    return _Order(rank, vocab_size, keys, offsets, ngrams, counts, totals, discounts)


def _check_suffixes(order: _Order, lower: _Order, name: str) -> None:
    _, found = _find(lower.ngrams, order.suffix_ngrams)
    _require(np.all(found), f"a {name} has a suffix that was never counted")
    _, found = _find(lower.keys, order.suffix_keys)
    _require(np.all(found), f"a {name} context has a suffix that was never counted")


# --------------------------------------------------------------------------- device tables

_BUCKET_KEYS = 15  # with the first row of the bucket, 64 bytes: one cache line
_BLOCK = 1 << 20  # candidates ranked at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NGramTables:
    """The best continuations of every context, on the device. Made by :meth:`KatzModel.tables`.

    ``tokens`` and ``log_probs`` hold one row for each trigram context (grouped by hash bucket),
    then one for each token alone, then one for no context at all.

    Attributes:
      buckets: ``[buckets, 16]`` uint32, a power of two of them: 15 keys ``a * V + b``, then the
        row of the first. Free places hold a key of another bucket, which no query matches.
      salt: uint32 scalar of the hash.
      tokens: ``[rows, branch]`` int32.
      log_probs: ``[rows, branch]`` float32, descending; token 0 at ``-inf`` beyond V.
      vocab_size: V.
    """

    buckets: jax.Array
    salt: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    vocab_size: int = dataclasses.field(metadata={"static": True})

    @property
    def branch(self) -> int:
        return self.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def look_up(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The best continuations of ``a, b`` by the full backed-off distribution.

        A context never seen falls back to ``b`` alone, and from there to no context.

        Args:
          a: int32 of any shape ``[...]``, the token before ``b``, in ``-1 .. V - 1``; -1 for
            none.
          b: int32 ``[...]``, the last token; -1 for none.

        Returns:
          Tokens int32 and log-probabilities float32, both ``[..., branch]``, descending.
        """
        width, size = _BUCKET_KEYS, self.vocab_size
        pair = (a >= 0) & (b >= 0)
        key = a.astype(jnp.uint32) * np.uint32(size) + b.astype(jnp.uint32)
        bits = self.buckets.shape[0].bit_length() - 1
        bucket = _take(self.buckets, _hash(key, self.salt, bits).astype(jnp.int32))
        match = (bucket[..., :width] == key[..., None]) & pair[..., None]
        places = lax.broadcasted_iota(jnp.int32, match.shape, match.ndim - 1)
        place = jnp.max(jnp.where(match, places, np.int32(-1)), axis=-1)
        fallback = self.tokens.shape[0] - size - 1 + jnp.where(b >= 0, b, np.int32(size))
        row = jnp.where(place >= 0, bucket[..., width].astype(jnp.int32) + place, fallback)
        return _take(self.tokens, row), _take(self.log_probs, row)


def _take(table: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(table, rows, axis=0, mode="clip")


def _hash(keys: Any, salt: Any, bits: int) -> Any:
    """Top ``bits`` of a salted mix of uint32 ``keys``, in NumPy or JAX.

    The mix is the finalizer of A. Appleby's MurmurHash3, a bijection of uint32.
    """
    x = keys ^ salt
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> np.uint32(16))) >> np.uint32(32 - bits)


def _place(keys: np.ndarray) -> tuple[np.uint32, int, np.ndarray]:
    """Salt, bits and the buckets ``[R]`` of distinct uint32 ``keys``; no bucket overflows.

    Starts at 2 to 4 keys a bucket; eight salts are tried before doubling the buckets. Keys
    chosen to collide under one salt scatter under the next.
    """
    smallest = max(1, (len(keys) // 4).bit_length())
    attempt = 0
    while True:
        bits = min(smallest + attempt // 8, 31)
        salt = np.uint32(attempt * 0x9E3779B9 % 2**32)
        bucket = _hash(keys, salt, bits).astype(np.int64)
        if np.bincount(bucket, minlength=1).max() <= _BUCKET_KEYS:
            return salt, bits, bucket
        attempt += 1


def _hash_table(keys: np.ndarray) -> tuple[np.ndarray, np.uint32, np.ndarray]:
    """``buckets`` and ``salt`` of :class:`NGramTables`, and the order of the rows."""
    salt, bits, bucket = _place(keys)
    order = np.argsort(bucket, kind="stable")
    first = _offsets(np.bincount(bucket, minlength=2**bits))[:-1]
    place = np.arange(len(keys)) - first[bucket[order]]
    # Free places hold key 0, and in the bucket where key 0 belongs, a key that does not.
    probes = _hash(np.arange(256, dtype=np.uint32), salt, bits)
    buckets = np.zeros((2**bits, _BUCKET_KEYS + 1), np.uint32)
    buckets[probes[0]] = np.argmax(probes != probes[0])
    buckets[bucket[order], place] = keys[order]
    buckets[:, _BUCKET_KEYS] = first
    return buckets, salt, order


# ---------------------------------------------------------- best continuations, all contexts


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """The most probable tokens of every context of one level, best first, ties by token.

    Attributes:
      offsets: ``[R + 1]`` int64, first entry of each row.
      tokens: int64, all rows one after the other.
      probabilities: float64, likewise.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray


def _compile(levels: list[_Level], branch: int) -> NGramTables:
    unigrams, bigrams, trigrams = levels
    size = unigrams.order.vocab_size
    kept = min(branch, size)
    # A trigram context takes its unseen candidates from the ranking of its suffix, where all
    # that it has seen itself may stand before them.
    wanted = np.full(len(bigrams.order.keys), kept)
    np.maximum.at(wanted, trigrams.parents, kept + trigrams.order.lengths)
    uniform = _Ranking(np.array([0, size]), np.arange(size), np.full(size, 1.0 / size))
    first = _rank(unigrams, uniform, np.array([size]))
    second = _rank(bigrams, first, np.minimum(wanted, size))
    third = _rank(trigrams, second, np.full(len(trigrams.order.keys), kept))
    buckets, salt, order = _hash_table(trigrams.order.keys.astype(np.uint32))

    def table(values: str, fill: float) -> np.ndarray:
        top, middle, bottom = (getattr(x, values) for x in (first, second, third))
        rows = np.full((len(order) + size + 1, branch), fill, top.dtype)
        rows[: len(order), :kept] = bottom.reshape(-1, kept)[order]
        rows[len(order) :, :kept] = top[:kept]
        best = second.offsets[:-1, None] + np.arange(kept)
        rows[len(order) + bigrams.order.keys, :kept] = middle[best]
        return rows

    with np.errstate(divide="ignore"):
        log_probs = np.log(table("probabilities", 0.0)).astype(np.float32)
    return NGramTables(
        buckets=jnp.asarray(buckets),
        salt=jnp.asarray(salt),
        tokens=jnp.asarray(table("tokens", 0).astype(np.int32)),
        log_probs=jnp.asarray(log_probs),
        vocab_size=size,
    )


def _rank(level: _Level, lower: _Ranking, wanted: np.ndarray) -> _Ranking:
    """The ``wanted`` ``[R]`` best tokens of every context, given rankings of its suffix.

    A suffix must be ranked at least as far as ``wanted`` plus what its context has seen.
    """
    work = _offsets(2 * level.order.lengths + wanted)
    cuts = np.searchsorted(work, np.arange(0, work[-1], _BLOCK), side="right") - 1
    cuts = np.unique(np.append(cuts, len(wanted)))
    blocks = [_rank_rows(level, lower, wanted, *cut) for cut in itertools.pairwise(cuts)]
    none = (np.zeros(0, np.int64), np.zeros(0))
    tokens, probabilities = zip(none, *blocks, strict=True)
    return _Ranking(_offsets(wanted), np.concatenate(tokens), np.concatenate(probabilities))


def _rank_rows(
    level: _Level, lower: _Ranking, wanted: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and probabilities of the rows ``start .. stop``, see :func:`_rank`."""
    order, size = level.order, level.order.vocab_size
    parents = level.parents[start:stop]
    borrowed = np.minimum(
        order.lengths[start:stop] + wanted[start:stop], np.diff(lower.offsets)[parents]
    )
    rows = np.repeat(np.arange(start, stop), borrowed)
    skip = lower.offsets[parents] - _offsets(borrowed)[:-1]
    index = np.repeat(skip, borrowed) + np.arange(len(rows))
    _, seen = _find(order.ngrams, order.keys[rows] * size + lower.tokens[index])
    rows, index = rows[~seen], index[~seen]

    own = slice(order.offsets[start], order.offsets[stop])
    tokens = np.concatenate([order.ngrams[own] % size, lower.tokens[index]])
    backed_off = level.backoff[rows] * lower.probabilities[index]
    probabilities = np.concatenate([level.probabilities[own], backed_off])
    rows = np.concatenate([order.rows[own], rows])
    best = np.lexsort((tokens, -probabilities, rows))
    lengths = np.bincount(rows - start, minlength=stop - start)
    place = np.arange(len(rows)) - np.repeat(_offsets(lengths)[:-1], lengths)
    best = best[place < np.repeat(wanted[start:stop], lengths)]
    return tokens[best], probabilities[best]
