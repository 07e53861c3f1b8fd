"""The n-gram on the device: the best continuations of every context, found by hash."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.ngram.levels import Level, cut_rows, find_keys, row_offsets

_BUCKET_KEYS = 15  # with the first row of the bucket, 64 bytes: one cache line
# Candidates ranked at a time, a row too many at most. So few stay in the processor's cache, and
# even with 3 V of one row they are fewer than 2**21.
_BLOCK = 1 << 15


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
        bucket = _take(self.buckets, hash_keys(key, self.salt, bits).astype(jnp.int32))
        match = (bucket[..., :width] == key[..., None]) & pair[..., None]
        places = lax.broadcasted_iota(jnp.int32, match.shape, match.ndim - 1)
        place = jnp.max(jnp.where(match, places, np.int32(-1)), axis=-1)
        fallback = self.tokens.shape[0] - size - 1 + jnp.where(b >= 0, b, np.int32(size))
        row = jnp.where(place >= 0, bucket[..., width].astype(jnp.int32) + place, fallback)
        return _take(self.tokens, row), _take(self.log_probs, row)


def _take(table: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(table, rows, axis=0, mode="clip")


def hash_keys(keys: Any, salt: Any, bits: int) -> Any:
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
        bucket = hash_keys(keys, salt, bits).astype(np.int64)
        if np.bincount(bucket, minlength=1).max() <= _BUCKET_KEYS:
            return salt, bits, bucket
        attempt += 1


def hash_table(keys: np.ndarray) -> tuple[np.ndarray, np.uint32, np.ndarray]:
    """``buckets`` and ``salt`` of :class:`NGramTables`, and the order of the rows."""
    salt, bits, bucket = _place(keys)
    order = np.argsort(bucket, kind="stable")
    first = row_offsets(np.bincount(bucket, minlength=2**bits))[:-1]
    place = np.arange(len(keys)) - first[bucket[order]]
    # Free places hold key 0, and in the bucket where key 0 belongs, a key that does not.
    probes = hash_keys(np.arange(256, dtype=np.uint32), salt, bits)
    buckets = np.zeros((2**bits, _BUCKET_KEYS + 1), np.uint32)
    buckets[probes[0]] = np.argmax(probes != probes[0])
    buckets[bucket[order], place] = keys[order]
    buckets[:, _BUCKET_KEYS] = first
    return buckets, salt, order


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The most probable tokens of every context of one level, best first, ties by token.

    Attributes:
      offsets: ``[R + 1]`` int64, first entry of each row.
      tokens: int32, all rows one after the other.
      probabilities: float64, likewise.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray

    def best(self, count: int) -> np.ndarray:
        """``[R, count]`` int64, the first ``count`` entries of every row; none may be shorter."""
        return self.offsets[:-1, None] + np.arange(count)


def rank(levels: list[Level], count: int) -> list[Ranking]:
    """The best tokens of every context of every level, at least ``count``, which is at most V."""
    unigrams, bigrams, trigrams = levels
    size = unigrams.order.vocab_size
    # A trigram context takes its unseen candidates from the ranking of its suffix, where all
    # that it has seen itself may stand before them.
    wanted = np.full(len(bigrams.order.keys), count)
    np.maximum.at(wanted, trigrams.parents, count + trigrams.order.lengths)
    uniform = Ranking(
        np.array([0, size]), np.arange(size, dtype=np.int32), np.full(size, 1.0 / size)
    )
    first = _rank(unigrams, uniform, np.array([size]))
    second = _rank(bigrams, first, np.minimum(wanted, size))
    third = _rank(trigrams, second, np.full(len(trigrams.order.keys), count))
    return [first, second, third]


def compile_tables(levels: list[Level], branch: int) -> NGramTables:
    size = levels[0].order.vocab_size
    kept = min(branch, size)
    first, second, third = rank(levels, kept)
    buckets, salt, order = hash_table(levels[2].order.keys.astype(np.uint32))
    tokens = np.zeros((len(order) + size + 1, branch), np.int32)
    log_probs = np.full(tokens.shape, -np.inf, np.float32)
    # Alone, a token without a row of its own has the continuations of no context at all.
    for rows, ranking, best in (
        (slice(len(order)), third, third.best(kept)[order]),
        (slice(len(order), None), first, first.best(kept)),
        (len(order) + levels[1].order.keys, second, second.best(kept)),
    ):
        tokens[rows, :kept] = ranking.tokens[best]
        log_probs[rows, :kept] = np.log(ranking.probabilities[best])
    arrays: Any = dict(buckets=buckets, salt=salt, tokens=tokens, log_probs=log_probs)
    return NGramTables(**jax.device_put(arrays), vocab_size=size)


def _rank(level: Level, lower: Ranking, wanted: np.ndarray) -> Ranking:
    """The ``wanted`` ``[R]`` best tokens of every context, given rankings of its suffix.

    A suffix must be ranked at least as far as ``wanted`` plus what its context has seen.
    """
    offsets = row_offsets(wanted)
    tokens, probabilities = np.empty(offsets[-1], np.int32), np.empty(offsets[-1])
    work = row_offsets(2 * level.order.lengths + wanted)
    for rows in cut_rows(work, _BLOCK):
        own = slice(offsets[rows.start], offsets[rows.stop])
        tokens[own], probabilities[own] = _rank_rows(level, lower, wanted, rows)
    return Ranking(offsets, tokens, probabilities)


def _rank_rows(
    level: Level, lower: Ranking, wanted: np.ndarray, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and probabilities of some rows, see :func:`_rank`."""
    order, size = level.order, level.order.vocab_size
    offsets, parents = order.offsets[rows.start : rows.stop + 1], level.parents[rows]
    lengths, wanted, start = np.diff(offsets), wanted[rows], lower.offsets[parents]
    borrowed = np.minimum(lengths + wanted, lower.offsets[parents + 1] - start)
    row = np.repeat(np.arange(rows.start, rows.stop), borrowed)
    index = np.repeat(start - row_offsets(borrowed)[:-1], borrowed) + np.arange(len(row))
    own = slice(offsets[0], offsets[-1])
    _, seen = find_keys(order.ngrams[own], order.keys[row] * size + lower.tokens[index])
    row, index = row[~seen], index[~seen]

    own_row = np.repeat(np.arange(rows.start, rows.stop), lengths)
    tokens = np.concatenate([order.ngrams[own] % size, lower.tokens[index]])
    backed_off = level.backoff[row] * lower.probabilities[index]
    probabilities = np.concatenate([level.probabilities(own, own_row), backed_off])
    row = np.concatenate([own_row, row]) - rows.start
    row, tokens, probabilities = _sort(row, tokens, probabilities)
    counts = np.bincount(row, minlength=len(wanted))
    place = np.arange(len(row)) - np.repeat(row_offsets(counts)[:-1], counts)
    best = place < np.repeat(wanted, counts)
    return tokens[best], probabilities[best]


def _sort(
    rows: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By row, then descending probability, then token; rows are below 2**21.

    Three sorts in one: with probabilities replaced by their dense ranks, each triple is one
    integer of 21 + 21 + 16 bits. That is seven times as fast as ``np.lexsort``.
    """
    order = np.argsort(-probabilities)
    descending = probabilities[order]
    fresh = np.ones(len(order), bool)
    np.not_equal(descending[1:], descending[:-1], out=fresh[1:])
    dense = np.empty(len(order), np.int64)
    dense[order] = np.cumsum(fresh) - 1
    triples = (rows << 37) | (dense << 16) | tokens
    triples.sort()
    values = descending[fresh]
    return triples >> 37, triples & 0xFFFF, values[(triples >> 16) & 0x1FFFFF]
