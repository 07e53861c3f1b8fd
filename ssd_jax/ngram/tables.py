"""The n-gram on the device: the best continuations of every context, found by hash."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.ngram.levels import Level, find_keys, row_offsets

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


def compile_tables(levels: list[Level], branch: int) -> NGramTables:
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
    buckets, salt, order = hash_table(trigrams.order.keys.astype(np.uint32))

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


def _rank(level: Level, lower: _Ranking, wanted: np.ndarray) -> _Ranking:
    """The ``wanted`` ``[R]`` best tokens of every context, given rankings of its suffix.

    A suffix must be ranked at least as far as ``wanted`` plus what its context has seen.
    """
    work = row_offsets(2 * level.order.lengths + wanted)
    cuts = np.searchsorted(work, np.arange(0, work[-1], _BLOCK), side="right") - 1
    cuts = np.unique(np.append(cuts, len(wanted)))
    blocks = [_rank_rows(level, lower, wanted, *cut) for cut in itertools.pairwise(cuts)]
    none = (np.zeros(0, np.int64), np.zeros(0))
    tokens, probabilities = zip(none, *blocks, strict=True)
    return _Ranking(row_offsets(wanted), np.concatenate(tokens), np.concatenate(probabilities))


def _rank_rows(
    level: Level, lower: _Ranking, wanted: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and probabilities of the rows ``start .. stop``, see :func:`_rank`."""
    order, size = level.order, level.order.vocab_size
    parents = level.parents[start:stop]
    borrowed = np.minimum(
        order.lengths[start:stop] + wanted[start:stop], np.diff(lower.offsets)[parents]
    )
    rows = np.repeat(np.arange(start, stop), borrowed)
    skip = lower.offsets[parents] - row_offsets(borrowed)[:-1]
    index = np.repeat(skip, borrowed) + np.arange(len(rows))
    _, seen = find_keys(order.ngrams, order.keys[rows] * size + lower.tokens[index])
    rows, index = rows[~seen], index[~seen]

    own = slice(order.offsets[start], order.offsets[stop])
    tokens = np.concatenate([order.ngrams[own] % size, lower.tokens[index]])
    backed_off = level.backoff[rows] * lower.probabilities[index]
    probabilities = np.concatenate([level.probabilities[own], backed_off])
    rows = np.concatenate([order.rows[own], rows])
    best = np.lexsort((tokens, -probabilities, rows))
    lengths = np.bincount(rows - start, minlength=stop - start)
    place = np.arange(len(rows)) - np.repeat(row_offsets(lengths)[:-1], lengths)
    best = best[place < np.repeat(wanted[start:stop], lengths)]
    return tokens[best], probabilities[best]
