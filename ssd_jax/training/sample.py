"""Text drawn from a trained model, in shards that can be drawn one by one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.errors import DataError
from ssd_jax.gpt2 import GPT2
from ssd_jax.training.config import SampleConfig
from ssd_jax.training.tokens import TokenFile, save_array


def sample_tokens(
    model: GPT2, key: jax.Array, prompts: jax.Array, *, length: int, temperature: float
) -> jax.Array:
    """Ancestral sampling from the whole vocabulary; may be jitted with the keywords static.

    Args:
      model: what draws.
      key: a PRNG key.
      prompts: ``[B, P]`` int32, ``P >= 1``, what the rows go on from.
      length: tokens drawn a row; with the prompt at most the model's ``n_positions`` and one.
      temperature: divides the logits; 0 takes the likeliest token.

    Returns:
      ``[B, length]`` int32, without the prompts. Rows go on past ``<|endoftext|>``: what follows
      is a new document, as in training.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    batch, given = prompts.shape
    slots = jnp.arange(given + length - 1)

    def step(carry, position):
        cache, token = carry
        mask = jnp.broadcast_to(slots <= position, (batch, 1, len(slots)))
        positions = jnp.broadcast_to(position, (batch, 1))
        logits, cache = model(token[:, None], positions, mask=mask, cache=cache, offset=position)
        scores = logits[:, 0]
        if temperature > 0:
            # Gumbel-max: an exact draw without normalising or sorting.
            noise = jax.random.gumbel(jax.random.fold_in(key, position), scores.shape)
            scores = scores / temperature + noise
        drawn = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        following = jnp.take(prompts, jnp.minimum(position + 1, given - 1), axis=1)
        token = jnp.where(position + 1 < given, following, drawn)
        return (cache, token), token

    _, tokens = lax.scan(step, (model.init_cache(batch, len(slots)), prompts[:, 0]), slots)
    return tokens[given - 1 :].T


def draw_shards(
    model: GPT2,
    config: SampleConfig,
    folder: Path,
    *,
    seed: int,
    end_of_text: int,
    text: TokenFile | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Draw the shards that ``folder`` lacks, ``00000.npy`` and on.

    Each is uint16 ``[B, prompt + length]``: rows begin with ``config.prompt`` consecutive tokens
    of ``text`` and go on from there; where that is 0, they go on from ``end_of_text``, which is
    not among them. A shard depends on ``seed`` and its number only, so an interrupted run loses
    at most one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = jax.jit(
        functools.partial(sample_tokens, length=config.length, temperature=config.temperature)
    )
    missing = [s for s in range(config.shards) if not (folder / f"{s:05}.npy").exists()]
    for done, shard in enumerate(missing, start=1):
        start = time.perf_counter()
        prompts = np.full((config.batch, 1), end_of_text, np.int32)
        if config.prompt and text is not None:
            random = np.random.default_rng((seed, shard))
            first = random.integers(0, len(text.tokens) - config.prompt, config.batch)
            prompts = text.read(first, config.prompt - 1)
        tokens = draw(model, jax.random.fold_in(jax.random.key(seed), shard), prompts)
        rows = np.concatenate([prompts[:, : config.prompt], tokens], axis=1)
        save_array(folder / f"{shard:05}.npy", rows.astype(np.uint16))
        seconds = time.perf_counter() - start
        rate, left = tokens.size / seconds, (len(missing) - done) * seconds / 60
        say(f"shard {shard + 1}/{config.shards}: {rate:.0f} tokens/s, {left:.1f} min left")


def read_shards(folder: Path, config: SampleConfig) -> Iterator[np.ndarray]:
    """The shards of a config one by one, memory-mapped.

    Raises:
      DataError: one is missing or damaged.
    """
    for shard in range(config.shards):
        path = folder / f"{shard:05}.npy"
        try:
            yield np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}); run the step that draws it") from error


def sampled_documents(folder: Path, config: SampleConfig, end_of_text: int) -> Iterator[np.ndarray]:
    """What was drawn, without the prompts, uint16, cut after each ``end_of_text``.

    Raises:
      DataError: a shard is missing or damaged.
    """
    for shard in read_shards(folder, config):
        for row in shard[:, config.prompt :]:
            ends = np.flatnonzero(row == end_of_text) + 1
            yield from (piece for piece in np.split(row, ends) if len(piece))
