"""Is speculation lossless here? Asked of the user's own models, on the user's own device."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax import kv_cache, program_cache
from ssd_jax.batch import bucket, generate_batch
from ssd_jax.errors import PromptError, SamplingError
from ssd_jax.generate import BATCH_SIZE, encode_prompt, generate, resolve_plan
from ssd_jax.generation_config import check_count
from ssd_jax.gpt2 import GPT2
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.sampling import Draw, Noise, Sampling, scores
from ssd_jax.stack import Stack

_LOG = logging.getLogger(__name__)

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "top_k": 50}
# Options that a sampled comparison may have: those whose distribution is known from logits alone.
WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# What a distribution that is right fails once in so many runs.
_ONCE_IN = 10_000
_FEWEST_EXPECTED = 5.0  # of a cell of a chi-squared test


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a text first differs from plain decoding's.

    Attributes:
      prompt: index of the prompt.
      plan: name of the plan.
      position: index in the continuation.
      tokens: what plain decoding chose there, and what came instead; ``None`` where a text ended
        before.
      logits: of these two, from one pass over the text before them.
      margin: how far their scores are apart (logits, over temperature and with noise), or one of
        them from where top-k and its like end, if that is nearer.
      rounding: how far apart rounding may put them, as measured on this prompt.
    """

    prompt: int
    plan: str
    position: int
    tokens: tuple[int | None, int | None]
    logits: tuple[float | None, float | None]
    margin: float | None
    rounding: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin is not None and self.margin <= self.rounding

    def __str__(self) -> str:
        kind = "a near tie" if self.near_tie else "NOT explained by rounding"
        (plain, other), (first, second) = self.tokens, self.logits
        if self.margin is None:
            return (
                f"prompt {self.prompt}, {self.plan}, token {self.position}: one text ended, {kind}"
            )
        return (
            f"prompt {self.prompt}, {self.plan}, token {self.position}: {plain} (logit "
            f"{first:.6f}) or {other} ({second:.6f}); margin {self.margin:.2e}, rounding up to "
            f"{self.rounding:.2e}: {kind}"
        )


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Two tokens of many samples against the oracle's exact probabilities.

    Attributes:
      prompt: index of the prompt.
      samples: how many were drawn.
      statistic, freedom: chi-squared, and its degrees of freedom.
      p_value: how often chance alone gives as much.
    """

    prompt: int
    samples: int
    statistic: float
    freedom: int
    p_value: float

    @property
    def fits(self) -> bool:
        return self.p_value > 1 / _ONCE_IN


@dataclasses.dataclass(frozen=True)
class Verification:
    """What :func:`verify_lossless` found.

    Attributes:
      numerics: of the oracle; ``exact`` whether it is an exact one.
      plans: by name.
      prompts, tokens: how many were compared, for each plan.
      identical: for each way of decoding (``greedy``, ``sampled``) and plan, how many texts were
        those of plain decoding.
      divergences: of each text that was not, in order.
      distributions: one for each prompt that was drawn from.
      seconds: it took.
    """

    numerics: str
    exact: bool
    plans: Mapping[str, Plan]
    prompts: int
    tokens: int
    identical: Mapping[str, Mapping[str, int]]
    divergences: Mapping[str, Sequence[Divergence]]
    distributions: Sequence[Distribution]
    seconds: float

    @property
    def lossless(self) -> bool:
        """Whether every text was plain decoding's or parted from it at a near tie (which an exact
        oracle has no excuse for), and every distribution was the oracle's."""
        parted = [one for found in self.divergences.values() for one in found]
        ties = not self.exact and all(one.near_tie for one in parted)
        return (not parted or ties) and all(one.fits for one in self.distributions)

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        document: dict[str, Any] = dataclasses.asdict(self) | {"lossless": self.lossless}
        document["plans"] = {name: dataclasses.asdict(plan) for name, plan in self.plans.items()}
        for way, found in self.divergences.items():
            parts = document["divergences"][way]
            for part, one in zip(parts, found, strict=True):
                part["near_tie"] = one.near_tie
        return document

    def __str__(self) -> str:
        exact = ", exact" if self.exact else ""
        lines = [f"oracle: {self.numerics}{exact}; {self.prompts} prompts, {self.tokens} tokens"]
        for way, counts in self.identical.items():
            for plan, count in counts.items():
                lines.append(f"{way:>8}, {plan:<12} {count} of {self.prompts} texts identical")
        for way, found in self.divergences.items():
            if found:
                ties = sum(one.near_tie for one in found)
                lines.append(
                    f"{way}: {len(found)} divergences, {ties} of them near ties; the first:"
                )
                lines.append(f"  {found[0]}")
        for one in self.distributions:
            verdict = "fits" if one.fits else "DOES NOT FIT"
            lines.append(
                f"distribution after prompt {one.prompt}: {one.samples} samples, chi-squared "
                f"{one.statistic:.1f} for {one.freedom} degrees of freedom, "
                f"p = {one.p_value:.3g}: {verdict}"
            )
        verdict = "lossless" if self.lossless else "NOT lossless"
        return "\n".join([*lines, f"{verdict} ({self.seconds:.0f} s)"])


def verification_plans(stack: Stack) -> dict[str, Plan]:
    """Plans that differ as much as plans do: that of greedy texts, the classical chain, and a wide
    tree without pruning."""
    plans = {"staged": resolve_plan(stack, "staged", None, sampled=False)[0]}
    if stack.drafts:
        plans["speculative"] = Plan.speculative()
    wide = DraftPlan(rounds=5, width=6, branch=4, threshold=0.0, cost=0.0)
    ngram = NGramPlan(branch=2 if stack.ngram is not None else 0)
    plans["wide"] = Plan(
        width=28, drafts=(wide,) * len(stack.drafts), ngram=ngram, depth=14, nodes=80, floor=0.0
    )
    return plans


def verify_lossless(
    stack: Stack,
    prompts: Sequence[str | Sequence[int]],
    *,
    plans: Mapping[str, Plan] | None = None,
    max_new_tokens: int = 128,
    sampled: Mapping[str, Any] = SAMPLED,
    samples: int = 2000,
) -> Verification:
    """Compare speculation with plain decoding, text by text.

    Each prompt is continued greedily, and sampled with its index as the seed: plainly and by each
    plan, alone. Where two texts part, the oracle looks at the place in one pass, and the distance
    of the two tokens is held against what rounding does to its logits: twice the largest
    difference between one-row passes and one pass over all of the prompt. At last, samples of two
    tokens are drawn by the first plan and held against the oracle's own probabilities.

    Args:
      stack: from :func:`ssd_jax.load`.
      prompts: texts or token ids.
      plans: by name; :func:`verification_plans` by default.
      max_new_tokens: for each text.
      sampled: options of the sampled texts; ``{}`` leaves these out, and the samples.
      samples: drawn after the first prompt; 0 for none.

    Raises:
      PromptError, SamplingError, PlanError: as for :func:`ssd_jax.generate`.
    """
    if not prompts:
        raise PromptError("there is no prompt to verify with; give at least one")
    check_count("samples", samples, 0)
    check_count("max_new_tokens", max_new_tokens, 1)
    if unknown := sorted(set(sampled) - set(WARPERS)):
        known = ", ".join(WARPERS)
        raise SamplingError(f"cannot verify with {', '.join(unknown)}; sampled may have {known}")
    if sampled and not sampled.get("temperature"):
        raise SamplingError("sampled needs a temperature above 0; give one, or {} for no samples")
    plans = verification_plans(stack) if plans is None else plans
    for plan in plans.values():
        plan.check_stack(len(stack.drafts), stack.ngram is not None)
    encoded = [encode_prompt(stack, prompt) for prompt in prompts]
    ways: dict[str, Mapping[str, Any]] = {"greedy": GREEDY}
    if sampled:
        ways["sampled"] = sampled
    started = time.perf_counter()
    identical = {way: dict.fromkeys(plans, 0) for way in ways}
    divergences: dict[str, list[Divergence]] = {way: [] for way in ways}
    count = 0
    # Buffers of one size serve all texts, with one program for each plan and way.
    longest = max(map(len, encoded)) + max_new_tokens
    capacity = bucket(min(longest, stack.oracle.config.n_positions))

    def text(prompt: list[int], plan: Plan, options: Mapping[str, Any]) -> list[int]:
        sampling = Sampling.create(1, **options)
        (one,) = generate_batch(stack, [prompt], max_new_tokens, sampling, plan, capacity)
        return one.tokens

    for index, prompt in enumerate(encoded):
        _LOG.info("comparing texts, prompt %s", _progress(index, len(encoded), started))
        for way, options in ways.items():
            options = {**options, "seed": index}
            plain = text(prompt, Plan.baseline(), options)
            count += len(plain) if way == "greedy" else 0
            for name, plan in plans.items():
                other = text(prompt, plan, options)
                if other == plain:
                    identical[way][name] += 1
                else:
                    place = (index, name, prompt, plain, other)
                    divergences[way].append(_divergence(stack, *place, options))
    distributions = []
    if sampled and samples:
        _LOG.info("drawing %d samples", samples)
        plan = next(iter(plans.values()))
        distributions.append(_distribution(stack, encoded[0], plan, dict(sampled), samples))
    return Verification(
        numerics=stack.oracle.numerics,
        exact=stack.oracle.exact,
        plans=plans,
        prompts=len(encoded),
        tokens=count,
        identical=identical,
        divergences=divergences,
        distributions=distributions,
        seconds=time.perf_counter() - started,
    )


def _progress(done: int, total: int, started: float) -> str:
    left = ""
    if done:
        seconds = (time.perf_counter() - started) / done * (total - done)
        left = f", about {math.ceil(seconds / 60)} min left" if seconds > 60 else ""
    return f"{done + 1} of {total}{left}"


def _divergence(
    stack: Stack,
    index: int,
    name: str,
    prompt: list[int],
    plain: list[int],
    other: list[int],
    options: Mapping[str, Any],
) -> Divergence:
    pairs = enumerate(zip(plain, other, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(plain), len(other)))
    first, second = (t[position] if position < len(t) else None for t in (plain, other))
    text = [*prompt, *plain[:position]]
    logits, margin = _logits(stack.oracle, text), None
    if first is not None and second is not None:
        margin = _margin(logits, (first, second), options, len(text))
    return Divergence(
        prompt=index,
        plan=name,
        position=position,
        tokens=(first, second),
        logits=(
            None if first is None else float(logits[first]),
            None if second is None else float(logits[second]),
        ),
        margin=margin,
        rounding=_rounding(stack.oracle, text) / (options["temperature"] or 1.0),
    )


def _margin(
    logits: np.ndarray, pair: tuple[int, int], options: Mapping[str, Any], position: int
) -> float:
    """See :class:`Divergence`."""
    warpers = {name: options[name] for name in WARPERS if name in options}
    draw = Sampling.create(1, seed=options["seed"], **warpers).draw
    if draw is None:
        return float(abs(logits[pair[0]] - logits[pair[1]]))
    scaled = logits / np.float32(options["temperature"])
    noise = Noise.undrawn(1, 1, logits.size).drawn(draw, jnp.array([position], jnp.int32))
    scored = scaled + np.asarray(noise.values)[0, 0]
    kept = np.isfinite(_warped(logits, draw))
    distances = [abs(scored[pair[0]] - scored[pair[1]])]
    if not kept.all():
        bounds = scaled[~kept].max(), scaled[kept].min()
        distances += [abs(scaled[token] - bounds[0 if kept[token] else 1]) for token in pair]
    return float(min(distances))


def _warped(logits: np.ndarray, draw: Draw | None) -> np.ndarray:
    """Warped logits, ``[V]``."""
    noiseless = Noise.undrawn(1, 1, logits.size)
    entry = jnp.zeros((1, 1), jnp.int32)
    return np.asarray(scores(jnp.asarray(logits)[None, None], noiseless, entry, draw))[0, 0]


def _padded(oracle: GPT2, text: list[int]) -> np.ndarray:
    """``[1, T]`` int32; causal, so that what the padding holds is not looked at."""
    size = min(bucket(len(text)), oracle.config.n_positions)
    return np.pad(np.array(text, np.int32), (0, size - len(text)))[None]


def _logits(oracle: GPT2, text: list[int]) -> np.ndarray:
    """``[V]``, after a text."""
    with program_cache.keeping():
        return jax.device_get(_pass(oracle, _padded(oracle, text)))[len(text) - 1]


def _rounding(oracle: GPT2, text: list[int]) -> float:
    """By how much rounding may change the difference of two logits."""
    with program_cache.keeping():
        padded = _padded(oracle, text)
        apart = jax.device_get(_pass(oracle, padded) - _passes(oracle, padded))
    return 2 * float(np.max(np.abs(apart[: len(text)])))


@jax.jit
def _pass(oracle: GPT2, text: jax.Array) -> jax.Array:
    """``[1, T]`` int32 -> logits ``[T, V]`` of one pass."""
    return oracle(text)[0][0]


@jax.jit
def _passes(oracle: GPT2, text: jax.Array) -> jax.Array:
    """The same of a pass for each token, as in plain decoding."""
    size = text.shape[1]

    def step(cache: kv_cache.KVCache, index: jax.Array):
        mask = (jnp.arange(size) <= index)[None, None]
        token = text[:, index][:, None]
        logits, written = oracle(token, index[None, None], mask=mask, cache=cache, offset=index)
        assert written is not None
        return written, logits[0, 0]

    return jax.lax.scan(step, oracle.init_cache(1, size), jnp.arange(size))[1]


def _distribution(
    stack: Stack, prompt: list[int], plan: Plan, options: dict[str, Any], count: int
) -> Distribution:
    """Draws two tokens often: both come out of one round if drafting is any good."""
    results = generate(
        stack,
        prompt,
        plan=plan,
        num_return_sequences=count,
        batch_size=max(BATCH_SIZE, 16),
        max_new_tokens=2,
        **options,
    )
    results = results if isinstance(results, list) else [results]
    drawn = collections.Counter(tuple(result.tokens) for result in results)
    expected = _exact_pairs(stack, prompt, options, {first for first, *_ in drawn})
    expected = {pair: count * share for pair, share in expected.items()}
    cells = [(drawn[pair], e) for pair, e in expected.items() if e >= _FEWEST_EXPECTED]
    # All that is improbable is one cell, impossible pairs among it.
    rest = (count - sum(n for n, _ in cells), count - sum(e for _, e in cells))
    impossible = sum(n for pair, n in drawn.items() if expected.get(pair, 0.0) == 0.0)
    if rest[1] >= 1:
        cells.append(rest)
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = max(len(cells) - 1, 1)
    p_value = float(jax.scipy.stats.chi2.sf(statistic, freedom))
    return Distribution(0, count, float(statistic), freedom, 0.0 if impossible else p_value)


def _exact_pairs(
    stack: Stack, prompt: list[int], options: dict[str, Any], firsts: set[int]
) -> dict[tuple[int, ...], float]:
    """Probabilities of the continuations that begin with one of some tokens."""

    def distribution(text: list[int]) -> np.ndarray:
        draw = Sampling.create(1, **options).draw
        warped = _warped(_logits(stack.oracle, text), draw)
        return np.asarray(jax.nn.softmax(jnp.asarray(warped)), np.float64)

    first = distribution(prompt)
    pairs: dict[tuple[int, ...], float] = {}
    for token in sorted(firsts):
        if token in stack.eos_ids:
            pairs[(token,)] = float(first[token])
            continue
        second = distribution([*prompt, token])
        pairs |= {(token, int(i)): float(first[token] * second[i]) for i in np.flatnonzero(second)}
    return pairs
