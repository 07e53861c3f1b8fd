"""The decode as a pure function: which token follows, given logits, position and seed.

``choose(warp(logits_t) + noise_t)``: greedy rows take the arg-max of their logits, sampled
rows the arg-max of their warped logits plus Gumbel noise, which is an exact draw from the
warped distribution (the Gumbel-max trick). The noise depends on (seed, absolute position,
token id) alone, so the text does not depend on what was drafted, nor on batching or chunking.

Seed contract: the noise of token ``v`` at position ``t`` is made from the first output word of
``threefry2x32`` (Salmon et al. 2011, 20 rounds) with key ``seed`` and counter ``(t, v)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.errors import SamplingError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each batch row chooses its tokens; every field is traced.

    Attributes:
      temperature: ``[B]`` float32; 0 is greedy.
      top_k: ``[B]`` int32; the vocabulary size (or more) turns it off.
      top_p: ``[B]`` float32 in (0, 1]; 1 turns it off.
      seed: ``[B, 2]`` uint32, the two key words of the noise.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @classmethod
    def create(
        cls,
        batch: int = 1,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        seed: int | Sequence[int] = 0,
    ) -> Sampling:
        """Validate user options; each is one value, or one for each row.

        Raises:
          SamplingError: an option lies outside its range.
        """
        rows = [
            _check_row(*row)
            for row in zip(
                _per_row(temperature, batch, "temperature"),
                _per_row(top_k, batch, "top_k"),
                _per_row(top_p, batch, "top_p"),
                _per_row(seed, batch, "seed"),
                strict=True,
            )
        ]
        temperatures, ks, ps, seeds = zip(*rows, strict=True)
        # Made on the host: JAX would compile a conversion for each.
        fields: dict[str, Any] = dict(
            temperature=np.array(temperatures, np.float32),
            top_k=np.array(ks, np.int32),
            top_p=np.array(ps, np.float32),
            seed=np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32),
        )
        return cls(**jax.device_put(fields))


def _per_row(value, batch: int, name: str) -> list:
    if isinstance(value, Sequence):
        if len(value) != batch:
            raise SamplingError(
                f"{name} has {len(value)} entries for {batch} prompts; give one each"
            )
        return list(value)
    return [value] * batch


def _check_row(temperature, top_k, top_p, seed) -> tuple[float, int, float, int]:
    """One row's options with their neutral values filled in."""
    off = np.iinfo(np.int32).max
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | np.number):
        raise SamplingError(f"temperature must be a number, not {temperature!r}")
    if not math.isfinite(temperature) or temperature < 0:
        raise SamplingError(
            f"temperature must be 0 (greedy) or a positive finite number, not {temperature}"
        )
    if 0 < temperature < 1e-4:
        raise SamplingError(
            f"temperature {temperature} is too small to divide by; use 0 for greedy"
        )
    if top_k is not None and (isinstance(top_k, bool) or int(top_k) != top_k or top_k < 0):
        raise SamplingError(f"top_k must be a positive integer, or 0 or None for off, not {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise SamplingError(f"top_p must lie in (0, 1], not {top_p}; 1 or None turns it off")
    if isinstance(seed, bool) or int(seed) != seed or not 0 <= seed < 2**64:
        raise SamplingError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
    return float(temperature), min(int(top_k or off), off), float(top_p or 1.0), int(seed)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: tuple, counter: tuple) -> tuple[jax.Array, jax.Array]:
    """The threefry2x32 block cipher, 20 rounds, element by element (Salmon et al. 2011).

    Written out in plain operations, so that it fuses into whatever consumes it.

    Args:
      key: two uint32 arrays.
      counter: two uint32 arrays, broadcastable with the key.

    Returns:
      Two uint32 arrays of random bits.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1


def gumbel_noise(sampling: Sampling, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise for the tokens at some positions.

    Zeros if no row samples, at no cost.

    Args:
      sampling: gives the seeds.
      positions: ``[B, Q]`` int32 absolute positions.
      vocab_size: V.

    Returns:
      ``[B, Q, V]`` float32.
    """

    def draw() -> jax.Array:
        seed = sampling.seed[:, :, None, None]
        counter = (
            positions.astype(jnp.uint32)[:, :, None],
            lax.broadcasted_iota(jnp.uint32, (1, 1, vocab_size), 2),
        )
        bits, _ = threefry2x32((seed[:, 0], seed[:, 1]), counter)
        # Minus log of an exponential. The uniform is small where the noise is large, so that
        # float32 resolves the upper tail (to about 22.9) and never reaches an infinity.
        uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
        return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2**-24))))

    shape = (*positions.shape, vocab_size)
    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: jnp.zeros(shape, jnp.float32))


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p, in the order and with the sense of ``transformers``.

    Excluded tokens become minus infinity. Tokens that tie with the last one included are kept.
    Greedy rows pass unchanged.

    Args:
      logits: ``[B, W, V]`` float32.
      sampling: the options of each row.

    Returns:
      ``[B, W, V]`` float32 unnormalised log-weights.
    """
    sampled = sampling.temperature > 0
    temperature = jnp.where(sampled, sampling.temperature, 1.0)
    logits = logits / temperature[:, None, None]
    limited = sampled & ((sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1.0))
    return lax.cond(jnp.any(limited), lambda: _truncate(logits, sampling, sampled), lambda: logits)


def _truncate(logits: jax.Array, sampling: Sampling, sampled: jax.Array) -> jax.Array:
    """Top-k and top-p by thresholds: ``k`` is traced, and sorts are ruinous."""
    kept = jnp.where(_in_top_k(logits, sampling, sampled), logits, -jnp.inf)

    def nucleus() -> jax.Array:
        top_p = jnp.where(sampled, sampling.top_p, 1.0)[:, None]
        # A token stays if the mass strictly above it is less than top_p. Where rounding leaves
        # the whole mass short of top_p, nothing is excluded.
        threshold = _threshold(kept, jax.nn.softmax(kept, axis=-1), top_p)
        return jnp.where((kept >= threshold[..., None]) | (top_p[..., None] >= 1), kept, -jnp.inf)

    return lax.cond(jnp.any(sampled & (sampling.top_p < 1)), nucleus, lambda: kept)


def _in_top_k(logits: jax.Array, sampling: Sampling, sampled: jax.Array) -> jax.Array:
    """``[B, W, V]`` bool: tokens that top-k keeps, all of them in rows not sampled."""
    top_k = jnp.where(sampled, sampling.top_k, logits.shape[-1])
    threshold = _threshold(logits, jnp.ones_like(logits), top_k.astype(jnp.float32)[:, None])
    return logits >= threshold[..., None]


def _threshold(values: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """A threshold that keeps the fewest of the largest values whose weights reach a goal.

    By halving, until at most one value of each row lies between the bounds: a dozen steps for
    distinct values, the distance of two floats for equal ones.

    Args:
      values: ``[B, W, V]`` float32.
      weights: ``[B, W, V]`` float32, not negative.
      goal: broadcastable to ``[B, W]``.

    Returns:
      ``[B, W]`` float32; the smallest finite value where all weights fall short of the goal.
    """
    finite = jnp.isfinite(values)
    low = jnp.min(jnp.where(finite, values, jnp.inf), axis=-1)
    high = jnp.nextafter(jnp.max(values, axis=-1), jnp.inf)
    count = jnp.sum(finite, axis=-1)

    def middle(low: jax.Array, high: jax.Array) -> jax.Array:
        return low + (high - low) / 2

    def unsettled(carry) -> jax.Array:
        low, high, above_low, above_high = carry
        between = (middle(low, high) > low) & (middle(low, high) < high)
        return jnp.any(between & (above_low - above_high > 1))

    def halve(carry):
        low, high, above_low, above_high = carry
        here = middle(low, high)
        above = values >= here[..., None]
        reached = jnp.sum(jnp.where(above, weights, 0.0), axis=-1) >= goal
        count = jnp.sum(above, axis=-1)
        return (
            jnp.where(reached, here, low),
            jnp.where(reached, high, here),
            jnp.where(reached, count, above_low),
            jnp.where(reached, above_high, count),
        )

    return lax.while_loop(unsettled, halve, (low, high, count, jnp.zeros_like(count)))[0]


def scores(logits: jax.Array, noise: jax.Array, level: jax.Array, sampling: Sampling) -> jax.Array:
    """What is compared when a token is chosen: the choice is the arg-max over V.

    Args:
      logits: ``[B, W, V]`` float32.
      noise: ``[B, Q, V]`` float32 from :func:`gumbel_noise`.
      level: ``[B, W]`` int32, which of the Q noise vectors belongs to each row of logits.
      sampling: the options of each row.

    Returns:
      ``[B, W, V]`` float32.
    """

    def perturbed() -> jax.Array:
        return warp(logits, sampling) + _noise_rows(noise, level, sampling)

    return lax.cond(jnp.any(sampling.temperature > 0), perturbed, lambda: logits)


def _noise_rows(noise: jax.Array, level: jax.Array, sampling: Sampling) -> jax.Array:
    """``[B, W, V]``: each row's noise, zero for greedy rows."""
    own = jnp.take_along_axis(noise, level[:, :, None], axis=1, mode="promise_in_bounds")
    return jnp.where((sampling.temperature > 0)[:, None, None], own, 0.0)


def choose(
    logits: jax.Array, noise: jax.Array, level: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """The chosen token of each row of logits, and by how much it won.

    The arg-max of :func:`scores`, without computing them: the best token under temperature and
    noise alone is nearly always one that top-k and top-p keep, and whether they keep one token
    takes a single sum to tell. If they do not, they keep none of the less probable either, so a
    few trials are enough for any distribution.

    Args:
      logits: ``[B, W, V]`` float32.
      noise: ``[B, Q, V]`` float32 from :func:`gumbel_noise`.
      level: ``[B, W]`` int32, which of the Q noise vectors belongs to each row of logits.
      sampling: the options of each row.

    Returns:
      Tokens ``[B, W]`` int32 and margins ``[B, W]`` float32: the best score less the second
      best, of the tokens that are not known to be excluded.
    """
    sampled = sampling.temperature > 0

    def by_trial() -> tuple[jax.Array, jax.Array]:
        scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None, None]
        scored = scaled + _noise_rows(noise, level, sampling)
        keeps = _keeps(scaled, sampling, sampled)

        def trial(carry):
            excluded, *_ = carry
            live = jnp.where(scaled > excluded[..., None], scored, -jnp.inf)
            token, margin = best_two(live)
            best = jnp.take_along_axis(scaled, token[..., None], -1, mode="promise_in_bounds")
            own = best[..., 0]
            # Without progress (logits that are not numbers) the token stands.
            kept = keeps(own) | ~(own > excluded)
            return jnp.where(kept, excluded, own), token, margin, kept

        start = (
            jnp.full(level.shape, -jnp.inf),
            jnp.zeros(level.shape, jnp.int32),
            jnp.zeros(level.shape),
            jnp.zeros(level.shape, bool),
        )
        _, token, margin, _ = lax.while_loop(lambda carry: ~jnp.all(carry[-1]), trial, start)
        return token, margin

    return lax.cond(jnp.any(sampled), by_trial, lambda: best_two(logits))


def _keeps(
    scaled: jax.Array, sampling: Sampling, sampled: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """A function that tells whether :func:`warp` keeps the tokens of some scaled logits ``[B, W]``,
    one in each row.

    Args:
      scaled: ``[B, W, V]`` float32, logits over temperature.
      sampling: the options of each row.
      sampled: ``[B]`` bool, rows to which they apply.
    """
    by_count = sampled & (sampling.top_k < scaled.shape[-1])
    by_mass = sampled & (sampling.top_p < 1)

    def mass(chosen: jax.Array) -> jax.Array:
        weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        return jnp.sum(jnp.where(chosen, weights, 0.0), axis=-1)

    # What top-k leaves is the whole of which top-p takes its share.
    none = jnp.zeros(scaled.shape[:2])
    whole = lax.cond(
        jnp.any(by_mass),
        lambda: lax.cond(
            jnp.any(by_mass & by_count),
            lambda: mass(_in_top_k(scaled, sampling, by_count)),
            lambda: mass(scaled > -jnp.inf),
        ),
        lambda: none,
    )

    def keeps(own: jax.Array) -> jax.Array:
        above = scaled > own[..., None]
        few = jnp.sum(above, axis=-1) < sampling.top_k[:, None]
        before = lax.cond(jnp.any(by_mass), lambda: mass(above), lambda: none)
        light = before < sampling.top_p[:, None] * whole
        return (few | ~by_count[:, None]) & (light | ~by_mass[:, None])

    return keeps


def best_two(scored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best token of each row, the first of equals, and its lead over the second best.

    Args:
      scored: ``[B, W, V]`` float32.

    Returns:
      Tokens ``[B, W]`` int32 and differences ``[B, W]`` float32.
    """
    # Three plain reductions: XLA vectorises them on a CPU, an arg-max not.
    best = jnp.max(scored, axis=-1)
    tokens = lax.broadcasted_iota(jnp.int32, scored.shape, scored.ndim - 1)
    token = jnp.min(jnp.where(scored == best[..., None], tokens, scored.shape[-1] - 1), axis=-1)
    second = jnp.max(jnp.where(tokens != token[..., None], scored, -jnp.inf), axis=-1)
    return token, best - second
