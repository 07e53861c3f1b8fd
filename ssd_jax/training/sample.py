"""The n-gram's corpus: text drawn from the draft, in shards that can be drawn one by one."""

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
from ssd_jax.training.tokens import save_array


def sample_tokens(
    model: GPT2,
    key: jax.Array,
    *,
    batch: int,
    length: int,
    temperature: float,
    end_of_text: int,
) -> jax.Array:
    """Ancestral sampling from the whole vocabulary; may be jitted with the keywords static.

    Args:
      model: the draft.
      key: a PRNG key.
      batch: rows drawn side by side.
      length: tokens a row; at most the model's ``n_positions``.
      temperature: divides the logits; positive.
      end_of_text: id of the token that rows begin after.

    Returns:
      ``[B, length]`` int32. The ``end_of_text`` that rows begin after is not among them. They go
      on past further ones: what follows is a new document, as in training.
    """
    slots = jnp.arange(length)

    def step(carry, position):
        cache, token = carry
        mask = jnp.broadcast_to(slots <= position, (batch, 1, length))
        positions = jnp.broadcast_to(position, (batch, 1))
        logits, cache = model(token[:, None], positions, mask=mask, cache=cache, offset=position)
        # Gumbel-max: an exact draw without normalising or sorting.
        noise = jax.random.gumbel(jax.random.fold_in(key, position), logits[:, 0].shape)
        token = jnp.argmax(logits[:, 0] / temperature + noise, axis=-1).astype(jnp.int32)
        return (cache, token), token

    first = jnp.full((batch,), end_of_text, jnp.int32)
    _, tokens = lax.scan(step, (model.init_cache(batch, length), first), slots)
    return tokens.T


def draw_shards(
    model: GPT2,
    config: SampleConfig,
    folder: Path,
    *,
    seed: int,
    end_of_text: int,
    say: Callable[[str], None] = print,
) -> None:
    """Draw the shards that ``folder`` lacks, ``00000.npy`` and on: uint16 ``[B, length]``.

    A shard depends on ``seed`` and its number only, so an interrupted run loses at most one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = jax.jit(
        functools.partial(
            sample_tokens,
            batch=config.batch,
            length=config.length,
            temperature=config.temperature,
            end_of_text=end_of_text,
        )
    )
    for shard in range(config.shards):
        path = folder / f"{shard:05}.npy"
        if path.exists():
            continue
        start = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(seed), shard)
        tokens = draw(model, key)
        save_array(path, np.asarray(tokens, np.uint16))
        rate = config.batch * config.length / (time.perf_counter() - start)
        say(f"shard {shard + 1}/{config.shards}: {rate:.0f} tokens/s")


def sampled_documents(folder: Path, shards: int, end_of_text: int) -> Iterator[np.ndarray]:
    """Documents of the first ``shards`` shards, uint16, cut after each ``end_of_text``.

    Raises:
      DataError: a shard is missing or damaged.
    """
    for shard in range(shards):
        path = folder / f"{shard:05}.npy"
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}); run the sample step") from error
        for row in rows:
            ends = np.flatnonzero(row == end_of_text) + 1
            yield from (piece for piece in np.split(row, ends) if len(piece))
