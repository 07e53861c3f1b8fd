"""The decode as a pure function: which token follows, given logits, position and seed.

A greedy row takes the arg-max of its logits, a row that samples the arg-max of its warped logits
plus Gumbel noise, which is an exact draw from the warped distribution (the Gumbel-max trick). The
noise depends on (seed, absolute position, token id) alone, so the text does not depend on what
was drafted, nor on batching or chunking.

Options have the names, senses and order of ``transformers``: first the logit processors
(:mod:`ssd_jax.processors`), greedy rows included; then, where a row samples, temperature, top-k,
top-p, min-p and typical-p, each applied to what the one before left.

Seed contract: the noise of token ``v`` at position ``t`` is made from the first output word of
``threefry2x32`` (Salmon et al. 2011, 20 rounds) with key ``seed`` and counter ``(t, v)``.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.errors import SamplingError
from ssd_jax.processors import Processors, per_row, real

# Every index is in range by construction; the default mode pays for a check.
take = partial(jnp.take_along_axis, mode="promise_in_bounds")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """How the rows of a batch draw their tokens; every field is traced.

    Greedy rows have the values that exclude nothing.

    Attributes:
      temperature: ``[B]`` float32; 0 is greedy.
      top_k: ``[B]`` float32; infinity excludes nothing.
      top_p: ``[B]`` float32 in (0, 1]; 1 excludes nothing. ``None`` where no row has top-p or min-p
        and there are no processors: then nothing is weighed.
      min_p: ``[B]`` float32 in [0, 1]; 0 excludes nothing. ``None`` where ``top_p`` is.
      typical_p: ``[B]`` float32 in (0, 1]; 1 excludes nothing. ``None`` where processors are.
      seed: ``[B, 2]`` uint32, the two key words of the noise.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array | None
    min_p: jax.Array | None
    typical_p: jax.Array | None
    seed: jax.Array

    @property
    def sampled(self) -> jax.Array:
        """``[B]`` bool: rows that are not greedy."""
        return self.temperature > 0

    def scale(self, logits: jax.Array) -> jax.Array:
        """Logits ``[B, W, V]`` over temperature; those of greedy rows as they are."""
        return logits / jnp.where(self.sampled, self.temperature, 1.0)[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each batch row chooses its tokens.

    What is ``None`` is not in the compiled program. There are four such programs: neither field;
    ``draw`` alone, without top-p and min-p and with them; and both. Values of options, and which
    of the others are on, are traced.

    Attributes:
      draw: ``None`` if every row is greedy and without processors.
      processors: ``None`` if no row has any.
    """

    draw: Draw | None
    processors: Processors | None

    @classmethod
    def create(
        cls,
        batch: int = 1,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        min_p: float | None | Sequence[float | None] = None,
        typical_p: float | None | Sequence[float | None] = None,
        seed: int | Sequence[int] = 0,
        vocab_size: int | None = None,
        **processors: Any,
    ) -> Sampling:
        """Validate user options; each is one value, or one for each row.

        Args:
          batch: B, rows.
          temperature: 0 is greedy.
          top_k: keep the k most probable tokens, and those that tie with the last; 0 or ``None``
            keeps all.
          top_p: keep the fewest most probable tokens that make up this mass.
          min_p: keep tokens at least this share as probable as the most probable one.
          typical_p: keep the fewest tokens that make up this mass, those first whose surprise is
            nearest to the entropy (Meister et al. 2022).
          seed: 0 to 2**64 - 1.
          vocab_size: if given, processors' token ids beyond it are refused.
          processors: options of :meth:`ssd_jax.processors.Processors.create`.

        Raises:
          SamplingError: an option is unknown or lies outside its range.
        """
        checks = {
            "temperature": (temperature, _temperature),
            "top_k": (top_k, _top_k),
            "top_p": (top_p, _mass),
            "min_p": (min_p, _min_p),
            "typical_p": (typical_p, _mass),
            "seed": (seed, _seed),
        }
        # Left on the host: most are made only to be validated.
        fields: dict[str, Any] = {
            name: np.stack([check(name, value) for value in per_row(values, batch, name)])
            for name, (values, check) in checks.items()
        }
        for name, neutral in _NEUTRAL.items():
            fields[name][fields["temperature"] == 0] = neutral
        typical = (fields["typical_p"] < 1).any()
        processed = Processors.create(
            batch, vocab_size=vocab_size, always=bool(typical), **processors
        )
        if processed is None:
            if not fields["temperature"].any():
                return cls(None, None)
            fields["typical_p"] = None
            if (fields["top_p"] == 1).all() and not fields["min_p"].any():
                fields["top_p"] = fields["min_p"] = None
        return cls(Draw(**fields), processed)


_NEUTRAL = {"top_k": np.inf, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def _temperature(name: str, value: Any) -> np.float32:
    value = real(name, value)
    if not math.isfinite(value) or value < 0:
        raise SamplingError(f"{name} must be 0 (greedy) or a positive finite number, not {value}")
    if 0 < value < 1e-4:
        raise SamplingError(f"{name} {value} is too small to divide by; use 0 for greedy")
    return np.float32(value)


def _top_k(name: str, value: Any) -> np.float32:
    if value is None or value == 0:
        return np.float32(np.inf)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise SamplingError(f"{name} must be a positive integer, or 0 or None for off, not {value}")
    return np.float32(value)


def _mass(name: str, value: Any) -> np.float32:
    value = 1.0 if value is None else real(name, value)
    if not 0.0 < value <= 1.0:
        raise SamplingError(f"{name} must lie in (0, 1], not {value}; 1 or None turns it off")
    return np.float32(value)


def _min_p(name: str, value: Any) -> np.float32:
    value = 0.0 if value is None else real(name, value)
    if not 0.0 <= value <= 1.0:
        raise SamplingError(f"{name} must lie in [0, 1], not {value}; 0 or None turns it off")
    return np.float32(value)


def _seed(name: str, value: Any) -> np.ndarray:
    whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
    if not whole or not 0 <= int(value) < 2**64:
        raise SamplingError(f"{name} must be an integer from 0 to 2**64 - 1, not {value!r}")
    return np.array([int(value) >> 32, int(value) & 0xFFFFFFFF], np.uint32)


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


def gumbel_noise(draw: Draw, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise for the tokens at some positions.

    Args:
      draw: gives the seeds.
      positions: ``[B, Q]`` int32 absolute positions.
      vocab_size: V.

    Returns:
      ``[B, Q, V]`` float32.
    """
    token = lax.broadcasted_iota(jnp.uint32, (1, 1, vocab_size), 2)
    return _gumbel(draw.seed[:, :, None, None], positions[:, :, None], token)


def _gumbel(seed: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """Gumbel noise, float32, for seeds ``[B, 2, ...]``, positions and tokens ``[B, ...]``."""
    bits, _ = threefry2x32((seed[:, 0], seed[:, 1]), (position.astype(jnp.uint32), token))
    # Minus log of an exponential. The uniform is small where the noise is large, so that
    # float32 resolves the upper tail (to about 22.9) and never reaches an infinity.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of the next Q positions of each row, of which most outlive a round.

    Attributes:
      values: ``[B, Q, V]`` float32; that of position t is entry t modulo Q, a power of two.
      end: ``[B]`` int32; positions before it have been drawn.
    """

    values: jax.Array
    end: jax.Array

    @classmethod
    def undrawn(cls, batch: int, size: int, vocab_size: int) -> Noise:
        """Room for at least ``size`` positions a row."""
        size = 1 << (size - 1).bit_length()
        return cls(jnp.zeros((batch, size, vocab_size)), jnp.zeros((batch,), jnp.int32))

    def entry(self, position: jax.Array) -> jax.Array:
        """Where the noise of some positions is, by a mask: on a GPU a remainder is a kernel."""
        return position & (self.values.shape[1] - 1)

    def drawn(self, draw: Draw, first: jax.Array) -> Noise:
        """With the noise of the positions from ``first`` ``[B]`` on, where a row samples."""
        # A CPU takes 20 us for a position at V = 8,192; a GPU makes all of them in one kernel.
        return lax.platform_dependent(
            self, draw, first, cpu=Noise._draw_missing, default=Noise._draw_all
        )

    def _draw_missing(self, draw: Draw, first: jax.Array) -> Noise:
        batch, size, vocab_size = self.values.shape
        goal = jnp.where(draw.sampled, first + size, 0)

        def one_more(noise: Noise) -> Noise:
            # A row that has all of its noise draws the last of it again.
            position = jnp.minimum(noise.end, goal - 1)
            fresh = gumbel_noise(draw, position[:, None], vocab_size)
            values = noise.values
            for row in range(batch):
                start = (row, self.entry(position[row]), 0)
                values = lax.dynamic_update_slice(values, fresh[row : row + 1], start)
            return Noise(values, jnp.minimum(noise.end + 1, goal))

        start = Noise(self.values, jnp.minimum(jnp.maximum(self.end, first), goal))
        return lax.while_loop(lambda noise: jnp.any(noise.end < goal), one_more, start)

    def _draw_all(self, draw: Draw, first: jax.Array) -> Noise:
        batch, size, vocab_size = self.values.shape
        # Of one flat index, all of it is one kernel: of several axes XLA makes parts beforehand.
        index = lax.broadcasted_iota(jnp.uint32, (batch, size * vocab_size), 1)
        entry, token = (index // vocab_size).astype(jnp.int32), index % vocab_size
        position = first[:, None] + self.entry(entry - first[:, None])
        values = _gumbel(draw.seed[:, :, None], position, token)
        return Noise(values.reshape(self.values.shape), first + size)


def perturb(log_prob: jax.Array, noise: jax.Array | float, draw: Draw | None) -> jax.Array:
    """Log-probabilities ``[B, W, X]`` of some tokens, over temperature and with their noise; those
    of greedy rows as they are."""
    if draw is None:
        return log_prob
    return jnp.where(draw.sampled[:, None, None], draw.scale(log_prob) + noise, log_prob)


def warp(logits: jax.Array, draw: Draw, rough: bool = False) -> jax.Array:
    """Temperature, top-k, top-p, min-p and typical-p, in the order and sense of ``transformers``.

    Excluded tokens become minus infinity. Tokens that tie with the last one included are kept, and
    so are those that are too improbable to be drawn. Greedy rows pass unchanged.

    Args:
      logits: ``[B, W, V]`` float32.
      draw: the options of each row.
      rough: static; where top-k and top-p end may be off a little, as is enough for proposals.

    Returns:
      ``[B, W, V]`` float32 unnormalised log-weights.
    """
    scaled = draw.scale(logits)
    if draw.top_p is None or draw.min_p is None:
        by_count = _rough_count_threshold if rough else _count_threshold
        least = by_count(scaled, draw.top_k)
    else:
        best = jnp.max(scaled, axis=-1)
        weight, slack = _weights(scaled, best), _SLACK if rough else 0.0
        least = _threshold(scaled, weight, best, draw.top_k, draw.top_p, slack)
        least = jnp.maximum(least, _least_probable(best, draw.min_p))
    kept = jnp.where(scaled >= least[..., None], scaled, -jnp.inf)
    if draw.typical_p is None:
        return kept
    share, slack = draw.typical_p, _SLACK if rough else 0.0
    return lax.cond(jnp.any(share < 1), lambda: _typical(kept, share, slack), lambda: kept)


def _weights(scaled: jax.Array, best: jax.Array) -> jax.Array:
    """Weights ``[B, W, V]`` of scaled logits, 1 for the best ones ``[B, W]``."""
    return jnp.exp(scaled - best[..., None])


def _least_probable(best: jax.Array, min_p: jax.Array) -> jax.Array:
    """``[B, W]`` float32, the least scaled logit that min-p keeps, given the greatest."""
    return best + jnp.log(min_p)[:, None]


def _typical(kept: jax.Array, share: jax.Array, slack: float) -> jax.Array:
    """Of some log-weights ``[B, W, V]`` those whose surprise is nearest to the entropy, the fewest
    that make up a share ``[B]`` of the mass."""
    log_prob = jax.nn.log_softmax(kept, axis=-1)
    prob = jnp.exp(log_prob)
    entropy = -jnp.sum(jnp.where(prob > 0, prob * log_prob, 0.0), axis=-1, keepdims=True)
    near = jnp.where(kept > -jnp.inf, -jnp.abs(log_prob + entropy), -jnp.inf)
    everything = jnp.full_like(share, jnp.inf)
    least = _threshold(near, prob, jnp.max(near, axis=-1), everything, share, slack)
    return jnp.where(near >= least[..., None], kept, -jnp.inf)


# Proposals keep up to this part more tokens than top-k leaves, and of the mass that top-p excludes.
_SLACK = 0.3

# Into how many groups a rough count deals the vocabulary.
_GROUPS = 128

# More than what noise makes good: it lies between -2.9 and 22.9.
_REACH = 32.0


class _Bounds(NamedTuple):
    """Of a threshold that is searched for by halving, all ``[B, W]`` float32.

    By halving it takes a dozen steps for distinct values, the distance of two floats for equal
    ones. Sorts are ruinous, and how many values a row keeps is traced.

    Attributes:
      low, high: the values from ``low`` on are enough, those from ``high`` on are not.
      more, fewer: how many values there are from ``low`` and from ``high`` on.
    """

    low: jax.Array
    high: jax.Array
    more: jax.Array
    fewer: jax.Array

    @classmethod
    def around(cls, values: jax.Array, best: jax.Array) -> _Bounds:
        """Of any threshold of ``values`` ``[B, W, V]``, of which ``best`` are the greatest."""
        return cls(
            low=best - _REACH,
            high=_above_all(best),
            more=jnp.full_like(best, values.shape[-1]),
            fewer=jnp.zeros_like(best),
        )

    @property
    def middle(self) -> jax.Array:
        return self.low + (self.high - self.low) / 2

    @property
    def exhausted(self) -> jax.Array:
        between = (self.middle > self.low) & (self.middle < self.high)
        return ~(between & (self.more - self.fewer > 1))

    def halved(self, enough: jax.Array, number: jax.Array) -> _Bounds:
        """The half that is left, given whether the values from the middle on are ``enough``, and
        their ``number``."""
        return _Bounds(
            low=jnp.where(enough, self.middle, self.low),
            high=jnp.where(enough, self.high, self.middle),
            more=jnp.where(enough, number, self.more),
            fewer=jnp.where(enough, self.fewer, number),
        )

    def least(self, best: jax.Array) -> jax.Array:
        """The threshold, once the search has ended; minus infinity where a row keeps all."""
        return jnp.where(self.low > best - _REACH, self.low, -jnp.inf)


def _above_all(best: jax.Array) -> jax.Array:
    """More than the best, however large it is."""
    return best + jnp.maximum(jnp.abs(best) * 1e-6, 1.0)


def _count_threshold(values: jax.Array, count: jax.Array) -> jax.Array:
    """The least value that is kept if a row keeps its ``count`` greatest ones.

    Arguments and result as of :func:`_threshold`, which does the same with a share of 1.
    """
    best, count = jnp.max(values, axis=-1), count[:, None]

    def searching(bounds: _Bounds) -> jax.Array:
        return jnp.any((bounds.more > count) & ~bounds.exhausted)

    def halve(bounds: _Bounds) -> _Bounds:
        number = _number(values >= bounds.middle[..., None])
        return bounds.halved(number >= count, number)

    return lax.while_loop(searching, halve, _Bounds.around(values, best)).least(best)


def _rough_count_threshold(values: jax.Array, count: jax.Array) -> jax.Array:
    """About :func:`_count_threshold`, without a search, whose trips are launches on a GPU.

    The vocabulary is dealt into groups. As many groups have one of the ``count`` greatest values as
    chance makes likely, and theirs are the greatest of the groups' maxima.

    Args:
      values: ``[B, W, V]`` float32.
      count: ``[B]`` float32; infinity for all.

    Returns:
      ``[B, W]`` float32. Minus infinity where a row keeps all, and where it keeps so many that
      hardly a group is without.
    """
    vocab = values.shape[-1]
    groups = min(_GROUPS, vocab)
    whole = vocab - vocab % groups
    maxima = jnp.max(values[..., :whole].reshape(*values.shape[:-1], -1, groups), axis=-2)
    rest = ((0, 0), (0, 0), (0, groups - vocab + whole))
    maxima = jnp.maximum(maxima, jnp.pad(values[..., whole:], rest, constant_values=-jnp.inf))
    # To a whole power, which is a few products that fuse with what follows.
    without = jnp.maximum(1 - count / vocab, 0.0) ** (vocab // groups)
    goal = groups * (1 - without)[:, None] - 0.5
    # The reduced axis is not the last one: XLA vectorises over that on a CPU.
    number = jnp.sum((maxima[..., :, None] >= maxima[..., None, :]).astype(jnp.float32), axis=-2)
    least = jnp.max(jnp.where(number >= goal[..., None], maxima, -jnp.inf), axis=-1)
    return jnp.where(goal < groups - 1, least, -jnp.inf)


class _Search(NamedTuple):
    """First for a number of values, then for a share of their weight.

    Attributes:
      bounds: of the threshold.
      goal: ``[B, W]`` float32, the weight that is looked for; negative while it is a number.
      weight: ``[B, W]`` float32, of the values from the lower bound on.
    """

    bounds: _Bounds
    goal: jax.Array
    weight: jax.Array


def _threshold(
    values: jax.Array,
    weight: jax.Array,
    best: jax.Array,
    count: jax.Array,
    share: jax.Array,
    slack: float = 0.0,
) -> jax.Array:
    """The least value that is kept if a row keeps its ``count`` greatest ones, and of these the
    fewest greatest that make up a ``share`` of their weight.

    One search, first for the count and then for the share, each until it is met or at most one
    value lies between the bounds.

    Args:
      values: ``[B, W, V]`` float32.
      weight: ``[B, W, V]`` float32, not negative.
      best: ``[B, W]`` float32, the greatest values.
      count: ``[B]`` float32; infinity for all.
      share: ``[B]`` float32 in (0, 1]; 1 for all.
      slack: static. With more than 0 the search ends sooner, and up to this part of the count, and
        of the weight beyond the share, is kept too much. What proposes need not be exact.

    Returns:
      ``[B, W]`` float32, at least ``best - _REACH``: less cannot win. Minus infinity where a row
      keeps all.
    """
    count, share = count[:, None], share[:, None]

    def weigh(search: _Search, where: jax.Array) -> _Search:
        """Look for the share of what lies above the lower bound."""
        bounds, high = search.bounds, jnp.where(share < 1, _above_all(best), search.bounds.low)
        return search._replace(
            bounds=bounds._replace(
                high=jnp.where(where, high, bounds.high),
                fewer=jnp.where(where, 0.0, bounds.fewer),
            ),
            goal=jnp.where(where, share * search.weight, search.goal),
        )

    def settled(search: _Search) -> jax.Array:
        counting = search.goal < 0
        near = counting & (search.bounds.more <= count * (1 + slack))
        if slack:
            most = search.goal * (1 + slack * (1 / share - 1))
            near |= ~counting & (search.weight <= most)
        return near | search.bounds.exhausted

    def halve(search: _Search) -> _Search:
        bounds, counting = search.bounds, search.goal < 0
        number, mass = _above(values >= bounds.middle[..., None], weight)
        enough = jnp.where(counting, number >= count, mass >= search.goal)
        search = search._replace(
            bounds=bounds.halved(enough, number), weight=jnp.where(enough, mass, search.weight)
        )
        return weigh(search, counting & settled(search))

    bounds = _Bounds.around(values, best)
    start = _Search(bounds, jnp.full_like(best, -1.0), jnp.sum(weight, axis=-1))
    start = weigh(start, count >= values.shape[-1])
    found = lax.while_loop(lambda search: jnp.any(~settled(search)), halve, start)
    return found.bounds.least(best)


def _number(above: jax.Array) -> jax.Array:
    """How many tokens ``[B, W, V]`` are ``above``: ``[B, W]`` float32."""
    return jnp.sum(above.astype(jnp.float32), axis=-1)


def _above(above: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many tokens ``[B, W, V]`` are ``above``, and their weight: ``[B, W]`` float32 each."""

    def apart(above: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _number(above), jnp.sum(jnp.where(above, weight, 0.0), axis=-1)

    def together(above: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands = above.astype(jnp.float32), jnp.where(above, weight, 0.0)
        zeros = jnp.float32(0), jnp.float32(0)
        return lax.reduce(operands, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), (2,))

    # One reduction is half the kernels on a GPU; on a CPU XLA vectorises only plain ones.
    return lax.platform_dependent(above, weight, cpu=apart, default=together)


def scores(
    logits: jax.Array,
    noise: Noise | None,
    entry: jax.Array,
    draw: Draw | None,
    rough: bool = False,
) -> jax.Array:
    """What is compared when a token is chosen: the choice is the arg-max over V.

    Args:
      logits: ``[B, W, V]`` float32.
      noise: at least of the positions that the rows of logits decide.
      entry: ``[B, W]`` int32, which of its entries belongs to each row of logits.
      draw: the options of each row; ``None`` if all are greedy, and there is no noise then.
      rough: see :func:`warp`.

    Returns:
      ``[B, W, V]`` float32.
    """
    if draw is None or noise is None:
        return logits
    return warp(logits, draw, rough) + _noise_rows(noise, entry, draw)


def _noise_rows(noise: Noise, entry: jax.Array, draw: Draw) -> jax.Array:
    """``[B, W, V]``: each row's noise, zero for greedy rows."""
    own = take(noise.values, entry[:, :, None], axis=1)
    return jnp.where(draw.sampled[:, None, None], own, 0.0)


def choose(
    logits: jax.Array, noise: Noise | None, entry: jax.Array, draw: Draw | None
) -> tuple[jax.Array, jax.Array]:
    """The chosen token of each row of logits, and by how much it won.

    The arg-max of :func:`scores`, mostly without computing them: the best token under temperature
    and noise alone is nearly always one that top-k, top-p and min-p keep, and whether they keep
    one token takes a sum to tell. If they do not, they keep none of the less probable either, so
    a few trials are enough for any distribution.

    Args:
      logits: ``[B, W, V]`` float32.
      noise: at least of the positions that the rows of logits decide.
      entry: ``[B, W]`` int32, which of its entries belongs to each row of logits.
      draw: the options of each row; ``None`` if all are greedy, and there is no noise then.

    Returns:
      Tokens ``[B, W]`` int32 and margins ``[B, W]`` float32: the best score less the second
      best, of the tokens that are not known to be excluded.
    """
    if draw is None or noise is None:
        return best_two(logits)
    scaled = draw.scale(logits)
    scored = scaled + _noise_rows(noise, entry, draw)
    if draw.typical_p is None:
        return _try_best(scaled, scored, draw)
    # Nearness to the entropy does not follow the logits.
    return lax.cond(
        jnp.any(draw.typical_p < 1),
        lambda: best_two(scores(logits, noise, entry, draw)),
        lambda: _try_best(scaled, scored, draw),
    )


def _try_best(scaled: jax.Array, scored: jax.Array, draw: Draw) -> tuple[jax.Array, jax.Array]:
    """What :func:`choose` returns, by trials.

    Args:
      scaled: ``[B, W, V]`` float32, logits over temperature.
      scored: ``[B, W, V]`` float32, the same with noise.
      draw: the options of each row, typical-p left out.
    """
    count, share = draw.top_k, draw.top_p
    if share is None or draw.min_p is None:

        def keeps(own: jax.Array) -> jax.Array:
            """Which tokens are kept, of one a row whose scaled logits are given ``[B, W]``."""
            return _number(scaled > own[..., None]) < count[:, None]
    else:
        best = jnp.max(scaled, axis=-1)
        weight = _weights(scaled, best)
        # What top-k leaves must be known before top-p takes its share: a trial could not tell.
        both = (count < jnp.inf) & (share < 1)
        first = (jnp.where(both, count, jnp.inf), jnp.where(both, share, 1.0))
        least = _threshold(scaled, weight, best, *first)
        least = jnp.maximum(least, _least_probable(best, draw.min_p))
        enough = jnp.where(share < 1, share, jnp.inf)[:, None] * jnp.sum(weight, axis=-1)

        def keeps(own: jax.Array) -> jax.Array:
            number, mass = _above(scaled > own[..., None], weight)
            return (number < count[:, None]) & (mass < enough) & (own >= least)

    def trial(state: jax.Array) -> jax.Array:
        live = jnp.where(scaled > state[0][..., None], scored, -jnp.inf)
        token, margin = best_two(live)
        own = take(scaled, token[..., None], axis=-1)[..., 0]
        # Read once more behind a barrier, XLA writes the new state over the old one.
        excluded, own = lax.optimization_barrier(jnp.stack([state[0], own]))
        # Without progress (logits that are not numbers) the token stands.
        kept = keeps(own) | ~(own > excluded)
        return jnp.stack(
            [
                jnp.where(kept, excluded, own),
                token.astype(jnp.float32),
                margin,
                kept.astype(jnp.float32),
            ]
        )

    # One array, as a loop carries each with kernels of its own; float32 holds any token exactly.
    start = jnp.zeros((4, *scaled.shape[:2])).at[0].set(-jnp.inf)
    found = lax.while_loop(lambda state: ~jnp.all(state[3] > 0), trial, start)
    return found[1].astype(jnp.int32), found[2]


def best_two(scored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best token of each row, the first of equals, and its lead over the second best.

    Args:
      scored: ``[B, W, V]`` float32.

    Returns:
      Tokens ``[B, W]`` int32 and differences ``[B, W]`` float32.
    """
    if scored.shape[-1] == 1:
        return jnp.zeros(scored.shape[:-1], jnp.int32), jnp.full(scored.shape[:-1], jnp.inf)
    best, token = best_few(scored, 2)
    return token[..., 0], best[..., 0] - best[..., 1]


_BLOCK = 128


def best_few(scored: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k``: the best of each row, best first, of equals the one with the lower index.

    Args:
      scored: ``[B, W, V]`` float32.
      count: how many, at most V.

    Returns:
      Scores ``[B, W, count]`` float32 and tokens ``[B, W, count]`` int32.
    """
    if scored.shape[-1] < 2 * count * _BLOCK:
        return _greatest(scored, count)
    by_blocks, directly = partial(_best_by_blocks, count=count), partial(_greatest, count=count)
    return lax.platform_dependent(scored, cpu=by_blocks, default=directly)


def _best_by_blocks(scored: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The best few lie in the blocks with the greatest maxima. XLA vectorises these on a CPU; its
    top-k goes over a row entry by entry."""
    batch, width, vocab = scored.shape
    whole = vocab - vocab % _BLOCK
    blocks = scored[:, :, :whole].reshape(batch, width, -1, _BLOCK)
    _, block = _greatest(jnp.max(blocks, axis=-1), count)
    block = jnp.sort(block, axis=-1)[..., None]  # so that of equals the first still comes first
    token = (block * _BLOCK + jnp.arange(_BLOCK)).reshape(batch, width, -1)
    rest = jnp.broadcast_to(jnp.arange(whole, vocab), (batch, width, vocab - whole))
    token = jnp.concatenate([token, rest], axis=-1)
    best, place = _greatest(take(scored, token, axis=-1), count)
    return best, take(token, place, axis=-1)


def _greatest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Behind a barrier: a slice of the result would merge into it, and XLA no longer see a top-k
    in what is then a sort (2 ms for 4 rows of 8,192 on a CPU)."""
    return lax.optimization_barrier(tuple(lax.top_k(values, count)))
