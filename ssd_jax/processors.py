"""Logit processors: what a row's own text and its user change about the logits.

Names, senses and order are those of ``transformers``: bias, repetition penalty, banned words,
minimum length; presence and frequency penalties, which it lacks, follow the repetition penalty and
have vLLM's sense. They come before temperature, and a greedy row has them too.

    repetition  z < 0 ? z * penalty : z / penalty   of tokens in prompt or continuation
    frequency   z - penalty * (how often)           of tokens in the continuation
    presence    z - penalty                         of tokens in the continuation

Each node of a token tree is given what holds after its own path: what depends on the committed
text alone is made once a round (:class:`History`), and of the tokens on a node's path, at most as
many as the tree is deep, the logits are made anew.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.errors import SamplingError

# Fills lists that differ in length: no token, and an index that scatters drop.
_NO_TOKEN = np.iinfo(np.int32).max
_ANY_TOKEN = -2  # in front of a banned sequence; not the -1 before the start of the text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Processors:
    """The options of each row; every field is traced.

    Attributes:
      repetition: ``[B]`` float32; 1 is off.
      presence, frequency: ``[B]`` float32; 0 is off.
      min_new: ``[B]`` int32, tokens before which no end-of-text token may come.
      biased: ``[B, L]`` int32 tokens.
      bias: ``[B, L]`` float32, what is added to their logits.
      banned: ``[B, S, K]`` int32, banned sequences, right-aligned.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    min_new: jax.Array
    biased: jax.Array
    bias: jax.Array
    banned: jax.Array

    @property
    def reach(self) -> int:
        """How many tokens before the next one the longest banned sequence takes."""
        return self.banned.shape[2] - 1

    @classmethod
    def create(
        cls,
        batch: int = 1,
        *,
        repetition_penalty: float | None | Sequence[float | None] = None,
        presence_penalty: float | None | Sequence[float | None] = None,
        frequency_penalty: float | None | Sequence[float | None] = None,
        logit_bias: Mapping[int, float] | None | Sequence[Mapping[int, float] | None] = None,
        bad_words_ids: Sequence | None = None,
        min_new_tokens: int | None | Sequence[int | None] = None,
        vocab_size: int | None = None,
        always: bool = False,
    ) -> Processors | None:
        """Validate user options; each is one value, or one for each row.

        Lists come in a few sizes, so that another list rarely compiles another program.

        Args:
          batch: B, rows.
          repetition_penalty: positive; above 1 makes tokens of prompt and continuation rarer.
          presence_penalty, frequency_penalty: above 0 make tokens of the continuation rarer.
          logit_bias: what is added to a token's logit; minus infinity excludes it.
          bad_words_ids: sequences of tokens that must not be completed, or such a list for each
            row. As in ``transformers``, an end-of-text token alone is no bad word.
          min_new_tokens: no end-of-text token before so many others.
          vocab_size: if given, token ids beyond it are refused.
          always: whether to return processors that change nothing, too.

        Returns:
          ``None`` if no row has any, unless ``always``.

        Raises:
          SamplingError: an option lies outside its range.
        """
        repetition = _floats("repetition_penalty", repetition_penalty, batch, 1.0)
        if (repetition <= 0).any():
            raise SamplingError(
                f"repetition_penalty must be above 0, not {repetition.min()}; 1 turns it off"
            )
        presence = _floats("presence_penalty", presence_penalty, batch, 0.0)
        frequency = _floats("frequency_penalty", frequency_penalty, batch, 0.0)
        shortest = [_min_new(value) for value in per_row(min_new_tokens, batch, "min_new_tokens")]
        biases = [_biases(value, vocab_size) for value in per_row(logit_bias, batch, "logit_bias")]
        banned = [_sequences(row, vocab_size) for row in _banned_rows(bad_words_ids, batch)]
        penalties = (repetition != 1).any() or presence.any() or frequency.any()
        if not always and not penalties and not any((*shortest, *biases, *banned)):
            return None
        # Made on the host: JAX would compile a conversion for each.
        fields: dict[str, Any] = dict(
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            min_new=np.array(shortest, np.int32),
            biased=_padded([list(row) for row in biases], np.int32, _NO_TOKEN),
            bias=_padded([list(row.values()) for row in biases], np.float32, 0.0),
            banned=_padded_sequences(banned),
        )
        return cls(**fields)


def per_row(value: Any, batch: int, name: str) -> list:
    """One value for each row, of an option that is one value or a sequence of them.

    Raises:
      SamplingError: the sequence's length is not ``batch``.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != batch:
            raise SamplingError(
                f"{name} has {len(value)} entries for {batch} prompts; give one each"
            )
        return list(value)
    return [value] * batch


def real(name: str, value: Any) -> float:
    """An option that must be a number.

    Raises:
      SamplingError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise SamplingError(f"{name} must be a number, not {value!r}")
    return float(value)


def _floats(name: str, value: Any, batch: int, off: float) -> np.ndarray:
    values = [off if row is None else real(name, row) for row in per_row(value, batch, name)]
    with np.errstate(over="ignore"):
        found = np.array(values, np.float32)
    if not np.isfinite(found).all():
        raise SamplingError(f"{name} must be finite, not {value}; {off:g} turns it off")
    return found


def _min_new(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise SamplingError(
            f"min_new_tokens must be 0 or a positive integer, not {value!r}; 0 turns it off"
        )
    return min(int(value), np.iinfo(np.int32).max)


def _biases(value: Any, vocab_size: int | None) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SamplingError(f"logit_bias must map token ids to numbers, not {value!r}")
    found = {}
    for token, bias in value.items():
        bias = real("logit_bias", bias)
        if math.isnan(bias) or bias == math.inf:
            raise SamplingError(
                f"logit_bias of token {token} must be finite, or minus infinity to exclude it, "
                f"not {bias}"
            )
        found[_token("logit_bias", token, vocab_size)] = bias
    return found


def _token(name: str, value: Any, vocab_size: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SamplingError(f"{name} has token id {value!r}, which must be an integer")
    token = int(value)
    if not 0 <= token < (_NO_TOKEN if vocab_size is None else vocab_size):
        last = "" if vocab_size is None else f" (0 to {vocab_size - 1})"
        raise SamplingError(f"{name} has token id {value}, which is outside the vocabulary{last}")
    return token


def _banned_rows(value: Any, batch: int) -> list:
    """Sequences for each row, of sequences for all of them or a list of such lists."""
    if value is None:
        return [None] * batch
    if not _is_list(value):
        raise SamplingError(f"bad_words_ids must be a list of token sequences, not {value!r}")
    by_row = any(row is None or (_is_list(row) and any(map(_is_list, row))) for row in value)
    return per_row(value, batch, "bad_words_ids") if by_row else [value] * batch


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _sequences(value: Any, vocab_size: int | None) -> list[list[int]]:
    if value is not None and not _is_list(value):
        raise SamplingError(f"bad_words_ids must be lists of token sequences, not {value!r}")
    found = []
    for sequence in () if value is None else value:
        if not _is_list(sequence) or not (sequence := list(sequence)):
            raise SamplingError(
                f"bad_words_ids must hold non-empty token sequences, not {sequence!r}"
            )
        found.append([_token("bad_words_ids", token, vocab_size) for token in sequence])
    return found


def _size(least: int, needed: int) -> int:
    """Room for a list: the next power of two."""
    return max(least, 1 << max(needed - 1, 0).bit_length())


def _padded(rows: list[list], dtype, fill) -> np.ndarray:
    found = np.full((len(rows), _size(16, max(map(len, rows)))), fill, dtype)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def _padded_sequences(rows: list[list[list[int]]]) -> np.ndarray:
    count = _size(8, max(map(len, rows)))
    longest = _size(4, max((len(s) for row in rows for s in row), default=0))
    found = np.full((len(rows), count, longest), _ANY_TOKEN, np.int32)
    found[:, :, -1] = _NO_TOKEN
    for row, sequences in zip(found, rows, strict=True):
        for place, sequence in zip(row, sequences, strict=False):
            place[-len(sequence) :] = sequence
    return found


@dataclasses.dataclass(frozen=True)
class History:
    """What the processors need to know of the committed text.

    Attributes:
      seen: ``[B, V]`` bool, tokens of prompt and continuation.
      count: ``[B, V]`` int32, how often each token is in the continuation.
      bias: ``[B, V]`` float32.
    """

    seen: jax.Array
    count: jax.Array
    bias: jax.Array

    @classmethod
    def of(
        cls,
        processors: Processors,
        text: jax.Array,
        start: jax.Array,
        length: jax.Array,
        vocab_size: int,
    ) -> History:
        """Args: texts ``[B, S']``, lengths ``[B]`` of prompts and of prompts with continuations."""
        row = jnp.arange(text.shape[0])[:, None]
        shape = (text.shape[0], vocab_size)
        position = jnp.arange(text.shape[1])
        written = jnp.where(position < length[:, None], text, _NO_TOKEN)
        new = (position >= start[:, None]).astype(jnp.int32)
        bias = jnp.zeros(shape).at[row, processors.biased]
        return cls(
            seen=jnp.zeros(shape, bool).at[row, written].set(True, mode="drop"),
            count=jnp.zeros(shape, jnp.int32).at[row, written].add(new, mode="drop"),
            bias=bias.add(processors.bias, mode="drop"),
        )


def process(
    logits: jax.Array,
    processors: Processors,
    history: History,
    recent: jax.Array,
    depth: jax.Array,
    new: jax.Array,
    eos: jax.Array,
) -> jax.Array:
    """The logits after some nodes of a tree, as the processors of their row leave them.

    Args:
      logits: ``[B, W, V]`` float32.
      processors: the options.
      history: of the committed text.
      recent: ``[B, W, R]`` int32, each node's token and those before it, newest first, -1 before
        the start of the text; R is at least the tree's depth and ``processors.reach``.
      depth: ``[B, W]`` int32, how many of them are not in ``history``.
      new: ``[B, W]`` int32, how many tokens the continuation has up to and with the node.
      eos: ``[B, F]`` int32 end-of-text ids, padded with -1.

    Returns:
      ``[B, W, V]`` float32.
    """
    logits = logits + history.bias[:, None]
    penalise = _penalty(processors)
    penalised = penalise(logits, history.seen[:, None], history.count[:, None])
    # Tokens of the path are penalised anew, for those of the text and those of the path together.
    # All of one token are given one value, so that it does not matter which of them is written.
    on_path = jnp.arange(recent.shape[2]) < depth[:, :, None]
    token = jnp.where(on_path, recent, 0)
    own = jnp.take_along_axis(logits, token, axis=2, mode="promise_in_bounds")
    twins = (recent[:, :, :, None] == recent[:, :, None, :]) & on_path[:, :, None, :]
    row, column = jnp.ogrid[: logits.shape[0], : logits.shape[1]]
    row, column = row[:, :, None], column[:, :, None]
    count = history.count[row, token] + jnp.sum(twins, axis=-1)
    place = jnp.where(on_path, token, _NO_TOKEN)
    fresh = penalise(own, jnp.ones_like(on_path), count)
    penalised = penalised.at[row, column, place].set(fresh, mode="drop")
    banned = _completed(processors, recent, eos)
    penalised = penalised.at[row, column, banned].set(-jnp.inf, mode="drop")
    early = (new < processors.min_new[:, None])[:, :, None]
    ends = jnp.where(early & (eos[:, None] >= 0), eos[:, None], _NO_TOKEN)
    return penalised.at[row, column, ends].set(-jnp.inf, mode="drop")


def _penalty(processors: Processors) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Logits, whether a token was seen, how often it was generated -> penalised logits; all
    ``[B, W, X]``."""
    options = processors.repetition, processors.presence, processors.frequency
    repetition, presence, frequency = (option[:, None, None] for option in options)

    def penalise(logits: jax.Array, seen: jax.Array, count: jax.Array) -> jax.Array:
        repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(seen, repeated, logits) - frequency * count.astype(jnp.float32)
        return logits - jnp.where(count > 0, presence, 0.0)

    return penalise


def _completed(processors: Processors, recent: jax.Array, eos: jax.Array) -> jax.Array:
    """``[B, W, S]`` int32, tokens that would complete a banned sequence, out of range for none."""
    *prefix, last = jnp.moveaxis(processors.banned, 2, 0)
    alone = jnp.ones(last.shape, bool)
    matched = jnp.ones((*recent.shape[:2], last.shape[1]), bool)
    for back, expected in enumerate(reversed(prefix)):
        matched &= (expected == _ANY_TOKEN)[:, None] | (
            expected[:, None] == recent[:, :, back, None]
        )
        alone &= expected == _ANY_TOKEN
    is_end = alone & jnp.any(last[:, :, None] == eos[:, None], axis=-1)
    return jnp.where(matched & ~is_end[:, None], last[:, None], _NO_TOKEN)
