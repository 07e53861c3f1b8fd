"""Text drawn from a trained model, in shards that can be drawn one by one."""

from __future__ import annotations

import itertools
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax import files
from ssd_jax.errors import DataError
from ssd_jax.gpt2 import GPT2
from ssd_jax.sampling import Sampling, warp
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training.config import SampleConfig
from ssd_jax.training.functions import documented_functions, function_beginning
from ssd_jax.training.progress import duration
from ssd_jax.training.tokens import TokenFile


def sample_tokens(
    model: GPT2,
    key: jax.Array,
    prompts: jax.Array,
    given: jax.Array,
    *,
    length: int,
    temperature: float,
    top_k: int = 0,
) -> jax.Array:
    """Ancestral sampling; may be jitted with the keywords static.

    Args:
      model: what draws.
      key: a PRNG key.
      prompts: ``[B, P]`` int32, ``P >= 1``, what the rows go on from.
      given: ``[B]`` int32, how many tokens of its prompt each row has; the rest is padding.
      length: tokens drawn a row; with the prompt at most the model's ``n_positions`` and one.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from so many of the likeliest tokens; 0 for the whole vocabulary.

    Returns:
      ``[B, length]`` int32, without the prompts. Rows go on past ``<|endoftext|>``: what follows
      is a new document, as in training.
    """
    prompts, given = (jnp.asarray(array, jnp.int32) for array in (prompts, given))
    batch, longest = prompts.shape
    slots = jnp.arange(longest + length - 1)
    # Logits are divided here: however cold a draw is, it has no least temperature.
    options = Sampling.create(batch, temperature=float(temperature > 0), top_k=top_k).draw

    def draw(logits, number):
        if options is not None:
            # Gumbel-max: an exact draw without normalising or sorting.
            noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
            logits = warp(logits[:, None] / temperature, options)[:, 0] + noise
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry, number):
        cache, token = carry
        # What is drawn lies behind the padding of the longest prompt.
        slot = longest + number
        mask = (slots < given[:, None]) | ((longest <= slots) & (slots <= slot))
        logits, cache = model(
            token[:, None], (given + number)[:, None], mask=mask[:, None], cache=cache, offset=slot
        )
        token = draw(logits[:, 0], number + 1)
        return (cache, token), token

    causal = slots <= jnp.arange(longest)[:, None]
    mask = jnp.broadcast_to(causal, (batch, longest, len(slots)))
    logits, cache = model(prompts, mask=mask, cache=model.init_cache(batch, len(slots)))
    logits = jnp.take_along_axis(logits, given[:, None, None] - 1, axis=1)
    first = draw(logits[:, 0], 0)
    _, tokens = lax.scan(step, (cache, first), jnp.arange(length - 1))
    return jnp.concatenate([first[:, None], tokens.T], axis=1)


class Prompts:
    """What the rows of every shard go on from, as ``config`` says.

    A shard's prompts depend on the text, ``seed`` and the shard's number only.

    Raises:
      DataError: the text has no function with a short enough beginning.
    """

    def __init__(self, config: SampleConfig, text: TokenFile, tokenizer: Tokenizer, seed: int):
        self._config, self._text, self._seed = config, text, seed
        self._end_of_text = cast(int, tokenizer.eos_token_id)
        self._beginnings: list[list[int]] = []
        if config.functions:
            wanted = _beginnings(text, tokenizer, config.prompt, seed)
            self._beginnings = list(itertools.islice(wanted, config.shards * config.batch))
            if not self._beginnings:
                raise DataError(
                    "the text has no function whose signature and docstring are at most "
                    f"{config.prompt} tokens to go on from; set functions = false where text is "
                    "drawn, or a larger prompt"
                )

    def __call__(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """``[B, P]`` int32 prompts and ``[B]`` how many tokens of each count."""
        batch, longest = self._config.batch, self._config.prompt
        if self._beginnings:
            rows = [
                self._beginnings[(shard * batch + row) % len(self._beginnings)]
                for row in range(batch)
            ]
            padded = np.zeros((batch, longest), np.int32)
            for row, beginning in zip(padded, rows, strict=True):
                row[: len(beginning)] = beginning
            return padded, np.array([len(row) for row in rows], np.int32)
        if not longest:
            return np.full((batch, 1), self._end_of_text, np.int32), np.ones(batch, np.int32)
        random = np.random.default_rng((self._seed, shard))
        first = random.integers(0, len(self._text.tokens) - longest, batch)
        return self._text.read(first, longest - 1), np.full(batch, longest, np.int32)


def _beginnings(
    text: TokenFile, tokenizer: Tokenizer, longest: int, seed: int
) -> Iterator[list[int]]:
    """Tokens of signature and docstring of the text's functions, documents in a random order."""
    seen: set[str] = set()
    documents = np.append(text.documents[:, 0], len(text.tokens))
    for index in np.random.default_rng(seed).permutation(len(documents) - 1):
        first, end = documents[index : index + 2]
        for function in documented_functions(
            tokenizer.decode(text.tokens[first : end - 1].tolist())
        ):
            beginning = function_beginning(function)
            if beginning not in seen and len(ids := tokenizer.encode(beginning)) <= longest:
                seen.add(beginning)  # a function may also be a document of its own
                yield ids


class Shard(NamedTuple):
    """Rows drawn from a model, uint16.

    Attributes:
      prompts: ``[B, P]``, what they go on from.
      given: ``[B]`` int32, how many tokens of its prompt each row has.
      drawn: ``[B, length]``.
    """

    prompts: np.ndarray
    given: np.ndarray
    drawn: np.ndarray


def draw_shards(
    model: GPT2,
    config: SampleConfig,
    folder: Path,
    prompts: Prompts,
    *,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Draw the shards that ``folder`` lacks, ``00000.npz`` and on, each a :class:`Shard`.

    A shard depends on its prompts, ``seed`` and its number only, so an interrupted run loses at
    most one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = jax.jit(sample_tokens, static_argnames=("length", "temperature", "top_k"))
    missing = [s for s in range(config.shards) if not _shard(folder, s).exists()]
    for done, shard in enumerate(missing, start=1):
        start = time.perf_counter()
        begun, given = prompts(shard)
        rows = draw(
            model,
            jax.random.fold_in(jax.random.key(seed), shard),
            begun,
            given,
            length=config.length,
            temperature=config.shard_temperature(shard),
            top_k=config.top_k,
        )
        kept = Shard(begun.astype(np.uint16), given, np.asarray(rows, np.uint16))
        with files.atomic_path(_shard(folder, shard)) as path, open(path, "wb") as file:
            np.savez(file, **kept._asdict())
        seconds = time.perf_counter() - start
        rate, left = rows.size / seconds, duration((len(missing) - done) * seconds)
        say(f"shard {shard + 1}/{config.shards}: {rate:.0f} tokens/s, {left} left")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npz"


def read_shards(folder: Path, config: SampleConfig) -> Iterator[Shard]:
    """The shards of a config one by one.

    Raises:
      DataError: one is missing or damaged.
    """
    for number in range(config.shards):
        path = _shard(folder, number)
        try:
            with np.load(path) as arrays:
                shard = Shard(*(arrays[name] for name in Shard._fields))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read {path} ({error}); run the step that draws it") from error
        yield shard


def sampled_documents(folder: Path, config: SampleConfig, end_of_text: int) -> Iterator[np.ndarray]:
    """What was drawn, without the prompts, uint16, cut after each ``end_of_text``.

    What was drawn after a function's beginning ends with the function: text that begins after it
    was not asked for.

    Raises:
      DataError: a shard is missing or damaged.
    """
    for shard in read_shards(folder, config):
        for row in shard.drawn:
            pieces = np.split(row, np.flatnonzero(row == end_of_text) + 1)
            pieces = [piece for piece in pieces if len(piece)]
            yield from pieces[:1] if config.functions else pieces
