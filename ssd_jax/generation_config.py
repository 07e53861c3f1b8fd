"""What a call of ``generate`` asks for besides the prompt."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssd_jax.errors import SamplingError
from ssd_jax.sampling import Sampling

# Fields handed on to Sampling.create, which checks them, under the same names. A new option of the
# sampler is a field of GenerationConfig, a name here, and one in _LISTS if its value is a list.
SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "bad_words_ids", "min_new_tokens"),
)
# What other libraries call an option, for the hint that an unknown name gets.
_ELSEWHERE = {
    "n": "num_return_sequences",
    "best_of": "num_return_sequences",
    "num_samples": "num_return_sequences",
    "stop": "stop_strings",
    "stop_token_ids": "stop_token_sequences",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "eos_id": "eos_token_id",
    "timeout": "max_time",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
    "sequence_bias": "logit_bias",
}
MAX_LOGPROBS = 128


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How one prompt is continued. Names and senses are those of
    ``transformers.GenerationConfig`` where it has them.

    Attributes:
      max_new_tokens: at most so many tokens.
      do_sample: ``False`` is greedy whatever the temperature, ``True`` wants a temperature above 0
        (1 where none is given); ``None`` leaves it to the temperature.
      temperature: 0 is greedy; ``None`` is 1 with ``do_sample``, else 0.
      top_k: sample among the k most probable tokens; ``None`` or 0 for all.
      top_p: sample among the most probable tokens that make up this mass; ``None`` for all.
      min_p: sample among tokens at least this share as probable as the most probable one.
      typical_p: sample among the tokens, of nearest to expected surprise, that make up this mass.
      repetition_penalty: above 1 makes tokens of prompt and continuation rarer.
      presence_penalty, frequency_penalty: above 0 make tokens of the continuation rarer, once or
        for each occurrence.
      logit_bias: what is added to tokens' logits, ``{50: -2.0, ...}``.
      bad_words_ids: token sequences that are never completed, ``[[50, 7], ...]``.
      min_new_tokens: no end-of-text token before so many others.
      seed: of the sampling noise. One seed gives one text, whatever the mode and the batch.
      num_return_sequences: continuations of the prompt; the i-th, from 0, is what ``seed + i``
        (modulo 2**64) gives alone.
      eos_token_id: ids that end a text: one, several, or none (``()``); ``None``
        for the oracle's own.
      stop_strings: end a text that contains one of them; the text is cut before it.
      stop_token_sequences: token sequences that do the same, ``[[50, 7], ...]``.
      max_time: seconds, compilation excluded, after which no new tokens are begun.
      logprobs: give each token's log-probability and so many alternatives; ``None`` for neither.
        They are of the oracle's own distribution, before temperature, filters and penalties.

    Raises:
      SamplingError: an option of the wrong type or outside its range.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_new_tokens: int | None = None
    seed: int = 0
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()
    stop_token_sequences: Sequence[Sequence[int]] = ()
    max_time: float | None = None
    logprobs: int | None = None

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens, 1)
        check_count("num_return_sequences", self.num_return_sequences, 1)
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_time(self.max_time)
        if self.do_sample not in (None, True, False):
            raise SamplingError(f"do_sample must be True, False or None, not {self.do_sample!r}")
        Sampling.create(1, **self.sampling_options())
        if self.do_sample and self.sampling_options()["temperature"] == 0:
            raise SamplingError("do_sample=True needs a temperature above 0; 0 means greedy")
        for name, value in (
            ("eos_token_id", _eos_ids(self.eos_token_id)),
            ("stop_strings", _strings(self.stop_strings)),
            ("stop_token_sequences", _sequences(self.stop_token_sequences)),
        ):
            object.__setattr__(self, name, value)

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn, rather than the most probable taken."""
        return self.sampling_options()["temperature"] > 0

    @property
    def interrupts(self) -> bool:
        """Whether something besides the compiled loop's own conditions may end the text."""
        return bool(self.stop_strings or self.stop_token_sequences or self.max_time is not None)

    def eos_ids(self, own: Sequence[int]) -> tuple[int, ...]:
        """Ids that end the text, ``own`` being the oracle's."""
        given = self.eos_token_id
        return tuple(own if given is None else (given,) if isinstance(given, int) else given)

    def sampling_options(self) -> dict[str, Any]:
        """Keywords of :meth:`ssd_jax.sampling.Sampling.create`."""
        options = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        if self.do_sample is False:
            options["temperature"] = 0.0
        elif self.temperature is None:
            options["temperature"] = 1.0 if self.do_sample else 0.0
        return options

    def samples(self) -> list[GenerationConfig]:
        """One configuration for each continuation that this one asks for."""
        return [
            dataclasses.replace(self, seed=(int(self.seed) + i) % 2**64, num_return_sequences=1)
            for i in range(self.num_return_sequences)
        ]


_FIELDS = [field.name for field in dataclasses.fields(GenerationConfig)]
# Options that are lists in themselves: given as one, it is for all prompts.
_LISTS = ("eos_token_id", "stop_strings", "stop_token_sequences", "bad_words_ids")


def configurations(
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    overrides: Mapping[str, Any],
    prompts: int,
) -> list[GenerationConfig]:
    """One configuration for each prompt.

    Args:
      config: one for all prompts, or one for each.
      overrides: fields to replace. An option that is one number may be a list, one entry for each
        prompt.
      prompts: how many there are.

    Raises:
      SamplingError: an unknown option, the wrong number of them, or a value out of range.
    """
    if isinstance(config, Sequence):
        configs = _one_each("config", config, prompts)
    else:
        configs = [GenerationConfig() if config is None else config] * prompts
    for given in configs:
        if not isinstance(given, GenerationConfig):
            raise SamplingError(
                f"config must be a GenerationConfig, or one for each prompt, not {given!r}"
            )
    if not overrides:
        return configs
    columns = {name: _column(name, value, prompts) for name, value in overrides.items()}
    return [
        dataclasses.replace(given, **{name: column[row] for name, column in columns.items()})
        for row, given in enumerate(configs)
    ]


def one_configuration(
    config: GenerationConfig | None, overrides: Mapping[str, Any]
) -> GenerationConfig:
    """The configuration of a text that is read as it is written.

    Raises:
      SamplingError: see :func:`configurations`; or several continuations are asked for.
    """
    (own,) = configurations(config, overrides, 1)
    if own.num_return_sequences > 1:
        raise SamplingError("a stream is of one text; leave num_return_sequences at 1")
    return own


def _column(name: str, value: Any, prompts: int) -> Sequence[Any]:
    """An option's value for each prompt."""
    if name not in _FIELDS:
        raise SamplingError(f"unknown option {name!r}; {_nearest(name)}")
    if isinstance(value, list | tuple | np.ndarray) and name not in _LISTS:
        return _one_each(name, value, prompts)
    return [value] * prompts


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.5)
    meant = _ELSEWHERE.get(name) or (close[0] if close else None)
    return f"did you mean {meant!r}?" if meant else f"known: {', '.join(_FIELDS)}"


def _one_each(name: str, values: Sequence[Any] | np.ndarray, prompts: int) -> list[Any]:
    if len(values) != prompts:
        raise SamplingError(
            f"{name} has {len(values)} entries for {prompts} prompts; give one each"
        )
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise :class:`SamplingError` unless ``value`` is an integer in this range."""
    if not _is_integer(value) or value < low or (high is not None and value > high):
        span = f"an integer of at least {low}" if high is None else f"from {low} to {high}"
        raise SamplingError(f"{name} must be {span}, not {value!r}")


def _check_time(value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise SamplingError(
            f"max_time must be a positive number of seconds, or None for no limit, not {value!r}"
        )


def _eos_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = (value,) if _is_integer(value) else value
    if isinstance(ids, str | Mapping) or not _all(ids, _is_integer) or any(i < 0 for i in ids):
        raise SamplingError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(int(i) for i in ids)


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not _all(strings, lambda s: isinstance(s, str)):
        raise SamplingError(f"stop_strings must be a string or a list of strings, not {value!r}")
    if not all(strings):
        raise SamplingError("a stop string is empty, which every text contains; leave it out")
    return tuple(strings)


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    sequences = () if value is None else value
    if not _all(sequences, lambda s: not isinstance(s, str) and _all(s, _is_integer)):
        raise SamplingError(
            f"stop_token_sequences must be a list of lists of token ids, not {value!r}"
        )
    if not all(len(s) for s in sequences):
        raise SamplingError("a stop token sequence is empty, which every text ends with")
    return tuple(tuple(int(i) for i in s) for s in sequences)


def _all(values: Any, check) -> bool:
    """Whether this is a list of some kind whose entries all pass."""
    sized = isinstance(values, Sequence | np.ndarray)
    return sized and all(check(value) for value in values)
