"""The n-gram file: counts in one safetensors file, checked in full when read."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from ssd_jax.files import atomic_path
from ssd_jax.ngram.counting import MAX_VOCAB_SIZE
from ssd_jax.ngram.discounts import MAX_DISCOUNTED
from ssd_jax.ngram.levels import Order, find_keys, row_sums

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


class DamageError(Exception):
    """Why a file cannot be used; :meth:`KatzModel.load` adds its name and the remedy."""


def _require(condition: Any, why: str) -> None:
    if not condition:
        raise DamageError(why)


def _pack(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small integers as one byte each; 255 stands for the next of the large ones."""
    return np.minimum(values, 255).astype(np.uint8), values[values >= 255].astype(np.uint32)


def _unpack(codes: np.ndarray, large: np.ndarray, what: str) -> np.ndarray:
    escaped = codes == 255
    _require(len(large) == escaped.sum() and np.all(large >= 255), f"{what} do not fit together")
    values = codes.astype(np.uint32)
    values[escaped] = large
    return values


def _to_tensors(order: Order) -> dict[str, np.ndarray]:
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


def checksum_of(vocab_size: int, tensors: dict[str, np.ndarray]) -> str:
    """CRC-32 of everything the file says."""
    crc = zlib.crc32(str(vocab_size).encode())
    for name in sorted(tensors):
        x = tensors[name]
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape} ".encode(), crc)
        crc = zlib.crc32(x.tobytes(), crc)
    return f"{crc:08x}"


def write_orders(path: str | os.PathLike[str], orders: list[Order]) -> None:
    """Write the orders, unigrams first, replacing ``path`` in one step."""
    tensors = {}
    for name, order in zip(_ORDER_NAMES, orders, strict=True):
        tensors |= {f"{name}.{key}": x for key, x in _to_tensors(order).items()}
    vocab_size = orders[0].vocab_size
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "vocab_size": str(vocab_size),
        "checksum": checksum_of(vocab_size, tensors),
    }
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(to_safetensors(tensors, metadata))


def read_orders(path: str | os.PathLike[str]) -> list[Order]:
    """The checked orders of a file. Raises ``DamageError``."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        # The last four: a type that safetensors knows and NumPy does not.
        raise DamageError(str(error) or type(error).__name__) from error
    _require(metadata.get("format") == _FORMAT, "it is not an n-gram model")
    version = metadata.get("version")
    _require(version == _VERSION, f"it has format version {version}, not {_VERSION}")
    digits = metadata.get("vocab_size", "")
    _require(digits.isdecimal() and len(digits) <= 5, "its vocabulary size is not a number")
    vocab_size = int(digits)
    _require(1 <= vocab_size <= MAX_VOCAB_SIZE, f"its vocabulary size is {vocab_size}")
    checksum = checksum_of(vocab_size, tensors)
    _require(metadata.get("checksum") == checksum, "its content does not match its checksum")
    names = {f"{order}.{name}" for order in _ORDER_NAMES for name in _DTYPES}
    odd = sorted(names ^ tensors.keys())
    _require(not odd, f"missing or unexpected tensors {', '.join(odd)}")
    orders: list[Order] = []
    for rank, name in enumerate(_ORDER_NAMES):
        own = {key: tensors[f"{name}.{key}"] for key in _DTYPES}
        orders.append(_from_tensors(rank, vocab_size, name, own))
        if rank:
            _check_suffixes(orders[rank], orders[rank - 1], name)
    return orders


def _from_tensors(rank: int, vocab_size: int, name: str, x: dict[str, np.ndarray]) -> Order:
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
    totals = row_sums(counts, offsets) + pruned
    _require(np.all(totals < 2**32), f"{name} totals exceed 32 bits")
    totals = totals.astype(np.uint32)
    return Order(rank, vocab_size, keys, offsets, ngrams, counts, totals, discounts)


def _check_suffixes(order: Order, lower: Order, name: str) -> None:
    _, found = find_keys(lower.ngrams, order.suffix_ngrams)
    _require(np.all(found), f"a {name} has a suffix that was never counted")
    _, found = find_keys(lower.keys, order.suffix_keys)
    _require(np.all(found), f"a {name} context has a suffix that was never counted")
