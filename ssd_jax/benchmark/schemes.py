"""Schemes of speculative sampling side by side, in plain NumPy: what does each accept?

The engine guesses the oracle's very draw: draft and oracle add the same Gumbel noise to their
scores, and a guess is accepted if it *is* the draw. The other school keeps only the
distribution: a guess is a sample of the draft's, accepted with a probability that makes up for
the difference. Every scheme here is lossless, in the sense of its school:

shared noise
  the text is the one that the oracle alone would have drawn (Gumbel coupling: Daliri et al. 2024)
rejection
  a chain (Leviathan et al. 2022; Chen et al. 2023)
recursive rejection
  a tree whose siblings are drawn without replacement (Jeon et al. 2024, after the multi-step
  rejection of SpecInfer, Miao et al. 2023)

All schemes draft alike. The best k of scores plus Gumbel noise, best first, *are* k draws
without replacement (Kool et al. 2019), so one noise gives the same tree to all of them. Only
where draws are shared may the tree be any set of guesses: chosen by how likely each one is to
win, say. Under rejection it has to hold all that was drawn, so its shape is settled before.

Written to be read, not to be fast; only forward passes are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.errors import ConfigError, SamplingError
from ssd_jax.generate import encode_prompt
from ssd_jax.gpt2 import GPT2
from ssd_jax.sampling import Sampling, gumbel_noise, warp
from ssd_jax.stack import Stack

SAMPLINGS: dict[str, dict[str, Any]] = {
    "topk50": {"temperature": 1.0, "top_k": 50},
    "t0.7": {"temperature": 0.7},
}
CHAIN = 4  # drafted tokens of a chain, as in Plan.speculative
NODES = 19  # drafted tokens of a tree, as many as Plan.staged shows the oracle
DEPTH = 12
BRANCH = 8  # children looked at below each node of a tree that is chosen by value
# How often the oracle's draw is the draft's first, second ... child; the fixed tree is the best
# one for these. Measured with the shipped trio at T=1, top-k 50, on HumanEval 100 to 111.
RATES = (0.66, 0.16, 0.05, 0.02, 0.01)

Row = dict[str, Any]
Say = Callable[[str], None]
Path = tuple[int, ...]  # a tree node is the tokens that lead to it; () is the text's newest token
Weights = Callable[[Sequence[int], Sequence[Path]], np.ndarray]
Rank = Callable[[np.ndarray, np.ndarray], np.ndarray]


# --- What a scheme is made of ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sources:
    """What the schemes draw on.

    Attributes:
      oracle, draft: from a text and a tree (parents first, the root ``()`` at the head) to
        log-weights ``[nodes, V]`` float32 of the token after each node: warped, unnormalised.
      noise: from an absolute position to Gumbel noise ``[V]`` float32; zeros when greedy.
      rng: what rejection draws from; independent of ``noise``.
      eos: end-of-text ids.
    """

    oracle: Weights
    draft: Weights
    noise: Callable[[int], np.ndarray]
    rng: np.random.Generator
    eos: tuple[int, ...] = ()

    def ends(self, path: Path) -> bool:
        return bool(path) and path[-1] in self.eos


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A tree of guesses.

    Attributes:
      tree: nodes, parents first, siblings in the order in which they were drawn.
      weights: the draft's log-weights ``[V]`` after each node that was expanded.
      passes: forward passes of the draft.
    """

    tree: list[Path]
    weights: dict[Path, np.ndarray]
    passes: int


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to guess, and how to check.

    Attributes:
      name: for the table.
      grow: from sources, text and the deepest level that is of use to a tree.
      verify: from sources, text, a tree and the oracle's log-weights after its nodes to the
        tokens that are committed, at least one.
      rival: name of the scheme that the table compares it with.
    """

    name: str
    grow: Callable[[Sources, Sequence[int], int], Drafted]
    verify: Callable[[Sources, Sequence[int], Drafted, Mapping[Path, np.ndarray]], Path]
    rival: str | None = None


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A continuation, and the passes of oracle and draft that it took."""

    tokens: list[int]
    passes: int
    draft_passes: int


def decode(sources: Sources, scheme: Scheme, prompt: Sequence[int], limit: int) -> Decoded:
    """Continue ``prompt`` until the end of the text, or until it is ``limit`` tokens long."""
    text, passes, draft_passes = list(prompt), 0, 0
    while len(text) < limit and (passes == 0 or text[-1] not in sources.eos):
        # The oracle adds a token of its own, so the last position is never drafted for.
        drafted = scheme.grow(sources, text, limit - 1 - len(text))
        after = dict(zip(drafted.tree, sources.oracle(text, drafted.tree), strict=True))
        tokens = scheme.verify(sources, text, drafted, after)
        ends = [i for i, token in enumerate(tokens) if token in sources.eos]
        text += tokens[: ends[0] + 1] if ends else tokens
        passes, draft_passes = passes + 1, draft_passes + drafted.passes
    return Decoded(text[len(prompt) :], passes, draft_passes)


# --- Guessing ----------------------------------------------------------------------------


def drawn(weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Rank children by their perturbed scores: best first, they are draws of the draft's."""
    return weights + noise


def probable(weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Rank children by their probabilities, blind to the noise that will decide."""
    return weights


def fixed_tree(
    sources: Sources, text: Sequence[int], depth: int, *, shape: Mapping[Path, int], rank: Rank
) -> Drafted:
    """A tree of one shape whatever the probabilities: the best children, so many of each node.

    Args:
      sources: the draft and the noise.
      text: the tokens so far.
      depth: deepest level.
      shape: how many children each node has; nodes are named by the places (0 is the best)
        that they and their ancestors take among their siblings.
      rank: :func:`drawn` or :func:`probable`.
    """
    places: dict[Path, Path] = {(): ()}
    weights: dict[Path, np.ndarray] = {}
    passes = 0
    while True:
        leaves = [
            path
            for path, place in places.items()
            if place in shape
            and path not in weights
            and len(path) < depth
            and not sources.ends(path)
        ]
        if not leaves:
            return Drafted(list(places), weights, passes)
        after = dict(zip(places, sources.draft(text, list(places)), strict=True))
        passes += 1
        for path in leaves:
            weights[path] = after[path]
            scores = rank(after[path], sources.noise(len(text) + len(path)))
            for place, token in enumerate(_best(scores, shape[places[path]])):
                places[*path, token] = (*places[path], place)


def best_tree(
    sources: Sources,
    text: Sequence[int],
    depth: int,
    *,
    nodes: int,
    rank: Rank,
    deepest: int = DEPTH,
    branch: int = BRANCH,
) -> Drafted:
    """The ``nodes`` most valuable nodes below the root.

    A node's value is the product along its path of softmax(scores), as in the engine; the draft
    looks until no unexpanded node is left among the best (OPT-Tree, Wang et al. 2024).

    Args:
      sources: the draft and the noise.
      text: the tokens so far.
      depth: deepest level that is of use.
      nodes: size of the tree.
      rank: :func:`drawn` or :func:`probable`.
      deepest: deepest level that is looked at.
      branch: children looked at below each node.
    """
    values: dict[Path, float] = {(): 0.0}
    weights: dict[Path, np.ndarray] = {}
    passes = 0
    while True:
        leaves = [
            path
            for path in values
            if path not in weights and len(path) < min(depth, deepest) and not sources.ends(path)
        ]
        if not leaves:
            return Drafted(list(values), weights, passes)
        after = dict(zip(values, sources.draft(text, list(values)), strict=True))
        passes += 1
        for path in leaves:
            weights[path] = after[path]
            scores = rank(after[path], sources.noise(len(text) + len(path)))
            with np.errstate(divide="ignore"):
                log_prob = np.log(softmax(scores))
            for token in _best(scores, branch):
                values[*path, token] = values[path] + log_prob[token]
        # What is dropped here cannot come back: the least value that is kept only rises.
        kept = sorted(values, key=lambda path: (-values[path], len(path)))[: nodes + 1]
        values = {path: values[path] for path in kept}


def _best(scores: np.ndarray, count: int) -> list[int]:
    """The best tokens, best first; excluded ones are none."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [int(token) for token in order if scores[token] > -np.inf]


def chain(length: int) -> dict[Path, int]:
    """The shape of a chain."""
    return {(0,) * level: 1 for level in range(length)}


def best_shape(nodes: int, rates: Sequence[float], depth: int) -> dict[Path, int]:
    """The fixed tree of ``nodes`` nodes that is right furthest, on average.

    It is so if the child in place i is right at the rate ``rates[i]`` wherever it stands
    (Sequoia, Chen et al. 2024): the best nodes by the product of the rates along their path.
    ``rates`` must not rise.
    """
    shape: dict[Path, int] = {}
    candidates: list[tuple[float, Path]] = [(-1.0, ())]
    taken = -1  # the root is no guess
    while candidates and taken < nodes:
        value, place = heapq.heappop(candidates)
        taken += 1
        if place:
            shape[place[:-1]] = place[-1] + 1
        if len(place) < depth:
            for child, rate in enumerate(rates):
                heapq.heappush(candidates, (value * rate, (*place, child)))
    return shape


# --- Checking ----------------------------------------------------------------------------


def matching(
    sources: Sources, text: Sequence[int], drafted: Drafted, after: Mapping[Path, np.ndarray]
) -> Path:
    """The oracle's own draws, for as long as the tree holds them."""
    path: Path = ()
    while path in after:
        scores = after[path] + sources.noise(len(text) + len(path))
        path = (*path, int(np.argmax(scores)))
    return path


def rejection(
    sources: Sources, text: Sequence[int], drafted: Drafted, after: Mapping[Path, np.ndarray]
) -> Path:
    """At every node the first of the children that is accepted, or a draw of what is left.

    Exact for :func:`fixed_tree` with :func:`drawn` children only. That the noise of a position
    may serve again in the next round is part of it: no token committed before depends on it.
    """
    path: Path = ()
    while True:
        p = softmax(after[path])
        children = [node[-1] for node in drafted.tree if node and node[:-1] == path]
        q = softmax(drafted.weights[path]) if children else p
        accept, rest = acceptance(p, q, children)
        tried = zip(children, accept, strict=True)
        child = next((child for child, rate in tried if sources.rng.random() < rate), None)
        if child is None:
            return (*path, int(sources.rng.choice(len(rest), p=rest)))
        path = (*path, child)


def acceptance(
    p: np.ndarray, q: np.ndarray, children: Sequence[int]
) -> tuple[list[float], np.ndarray]:
    """Recursive rejection sampling; with one child, Leviathan's rule.

    Args:
      p: ``[V]`` float64, the oracle's distribution.
      q: ``[V]`` float64, the draft's.
      children: tokens drawn from ``q`` without replacement, in order.

    Returns:
      The probability that each child is accepted once those before it have been rejected, and
      ``[V]``, what the token is drawn from if none is.
    """
    accept = []
    for child in children:
        accept.append(min(1.0, p[child] / q[child]))
        rest = np.maximum(p - q, 0.0)
        # Where the draft covers the oracle nothing is ever rejected, but for rounding.
        p = rest / rest.sum() if rest.any() else p
        q = np.where(np.arange(len(q)) == child, 0.0, q)
        q = q / q.sum() if q.any() else q
    return accept, p


def softmax(scores: np.ndarray) -> np.ndarray:
    """``[V]`` float64."""
    scores = scores.astype(np.float64)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# --- Probabilities of the models ---------------------------------------------------------


class Reader:
    """A model as :class:`Sources` wants it: a function of text and tree.

    Behind it is a cache of the text, which nobody need know of. A pass takes the tokens that
    are not in the cache yet, and the tree behind them; of these only the text's stay.

    Args:
      model: the model. Past its last position it repeats that position.
      sampling: of one row.
      longest: the longest text, in tokens.
      rows: tokens a pass; at least as many as a tree has nodes, root included.
    """

    def __init__(self, model: GPT2, sampling: Sampling, longest: int, rows: int):
        self.model, self.sampling, self.rows = model, sampling, rows
        # In steps of 128, so that texts of many lengths share a program.
        self._cache = model.init_cache(1, 128 * math.ceil((longest + rows) / 128))
        self._seen: list[int] = []

    def __call__(self, text: Sequence[int], tree: Sequence[Path]) -> np.ndarray:
        known = 0
        for seen, token in zip(self._seen, text[:-1], strict=False):
            if seen != token:
                break
            known += 1
        while len(text) - known + len(tree) - 1 > self.rows:
            end = min(known + self.rows, len(text) - 1)
            self._read(text[known:end], [], known)
            known = end
        weights = self._read(text[known:], tree[1:], known)
        self._seen = list(text)
        root = len(text) - known - 1
        return weights[root : root + len(tree)]

    def _read(self, tokens: Sequence[int], nodes: Sequence[Path], known: int) -> np.ndarray:
        """Log-weights ``[rows, V]`` after the tokens that follow ``known`` others, and after
        the nodes below the last one of them."""
        size, count = len(tokens), len(tokens) + len(nodes)
        levels = [*range(size), *(size - 1 + len(node) for node in nodes)]
        lineage = np.tri(count, dtype=bool)
        for i, node in enumerate(nodes):
            lineage[size + i, size:] = [other == node[: len(other)] for other in nodes]
        row = np.zeros((2, 1, self.rows), np.int32)
        row[0, 0, :count] = [*tokens, *(node[-1] for node in nodes)]
        row[1, 0, :count] = np.minimum(known + np.array(levels), self.model.config.n_positions - 1)
        mask = np.zeros((1, self.rows, self._cache.slots), bool)
        mask[:, :, :known] = True
        mask[0, :count, known : known + count] = lineage
        weights, self._cache = _log_weights(
            self.model, self._cache, self.sampling, *row, mask, jnp.int32(known)
        )
        return np.asarray(weights)


@partial(jax.jit, donate_argnames="cache")
def _log_weights(model, cache, sampling, tokens, positions, mask, offset):
    logits, cache = model(tokens, positions, mask=mask, cache=cache, offset=offset)
    return (logits if sampling.draw is None else warp(logits, sampling.draw))[0], cache


_noise = jax.jit(gumbel_noise, static_argnames="vocab_size")


def run(
    stack: Stack,
    scheme: Scheme,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    seed: int = 0,
    **options: Any,
) -> Decoded:
    """Continue token ids by a scheme, with a stack's oracle and first draft.

    Args:
      stack: the stack.
      scheme: the scheme.
      prompt: token ids.
      max_new_tokens: at most so many tokens.
      seed: of the noise, as for :func:`~ssd_jax.generate.generate`, and of rejection.
      options: of :meth:`~ssd_jax.sampling.Sampling.create`.

    Raises:
      ConfigError: the stack has no model draft.
    """
    if not stack.drafts:
        raise ConfigError("the schemes draft with a model; load a stack that has a draft")
    sampling = Sampling.create(1, seed=seed, **options)
    limit = min(len(prompt) + max_new_tokens, stack.oracle.config.n_positions)
    # A round leaves at most a path and the oracle's token to be read along with the next tree.
    rows = NODES + DEPTH + 2

    @functools.cache
    def noise(position: int) -> np.ndarray:
        if sampling.draw is None:
            return np.zeros(stack.vocab_size, np.float32)
        place = jnp.full((1, 1), position)
        return np.asarray(_noise(sampling.draw, place, stack.vocab_size))[0, 0]

    sources = Sources(
        oracle=Reader(stack.oracle, sampling, limit, rows),
        draft=Reader(stack.drafts[0], sampling, limit, rows),
        noise=noise,
        rng=np.random.default_rng(seed),
        eos=stack.eos_ids,
    )
    return decode(sources, scheme, prompt, limit)


# --- The schemes that are compared -------------------------------------------------------

_LINE, _SHAPE = chain(CHAIN), best_shape(NODES, RATES, DEPTH)
SCHEMES = (
    Scheme("rejection, chain", partial(fixed_tree, shape=_LINE, rank=drawn), rejection),
    Scheme(
        "shared noise, chain",
        partial(fixed_tree, shape=_LINE, rank=drawn),
        matching,
        rival="rejection, chain",
    ),
    Scheme(
        "recursive rejection, fixed tree",
        partial(fixed_tree, shape=_SHAPE, rank=drawn),
        rejection,
        rival="rejection, chain",
    ),
    Scheme(
        "shared noise, fixed tree",
        partial(fixed_tree, shape=_SHAPE, rank=drawn),
        matching,
        rival="recursive rejection, fixed tree",
    ),
    Scheme(
        "shared noise, tree by value",
        partial(best_tree, nodes=NODES, rank=drawn),
        matching,
        rival="recursive rejection, fixed tree",
    ),
    Scheme(
        "unseen noise, tree of the likeliest",
        partial(best_tree, nodes=NODES, rank=probable),
        matching,
        rival="recursive rejection, fixed tree",
    ),
)


def compare(
    stack: Stack,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    samplings: Mapping[str, Mapping[str, Any]] = SAMPLINGS,
    seed: int = 0,
    say: Say = print,
) -> list[Row]:
    """Tokens per oracle pass of every scheme, with its standard error over the prompts.

    Args:
      stack: gives the oracle and its first draft.
      prompts: texts or token ids; prompt ``i`` is continued with seed ``seed + i``.
      max_new_tokens: for each prompt.
      samplings: options of :meth:`~ssd_jax.sampling.Sampling.create`, by name.
      seed: the first prompt's.
      say: told of the progress.

    Returns:
      A row for each sampling and scheme. ``difference`` is what it takes more than its
      ``rival`` does, ``None`` without one; the errors are ``None`` for a single prompt.

    Raises:
      ConfigError: the stack has no model draft.
      SamplingError: a sampling is greedy; there is nothing to reject by then.
    """
    for name, options in samplings.items():
        if not options.get("temperature"):
            raise SamplingError(f"schemes of sampling need a temperature; {name!r} is greedy")
    done: dict[tuple[str, str], list[Decoded]] = {}
    for index, prompt in enumerate(prompts):
        say(f"schemes: prompt {index + 1} of {len(prompts)}")
        tokens = encode_prompt(stack, prompt)
        for name, options in samplings.items():
            for scheme in SCHEMES:
                decoded = run(
                    stack,
                    scheme,
                    tokens,
                    max_new_tokens=max_new_tokens,
                    seed=seed + index,
                    **options,
                )
                done.setdefault((name, scheme.name), []).append(decoded)
    return [
        {"scheme": scheme.name, "sampling": name}
        | _figures(
            done[name, scheme.name], None if scheme.rival is None else done[name, scheme.rival]
        )
        | {"rival": scheme.rival}
        for name in samplings
        for scheme in SCHEMES
    ]


def _figures(own: Sequence[Decoded], rival: Sequence[Decoded] | None) -> Row:
    """The figures of one row, over the prompts."""
    rate, residual = _rate(own)
    row: Row = {
        "tokens per oracle pass": rate,
        "standard error": _standard_error(residual),
        "draft passes per oracle pass": (
            sum(d.draft_passes for d in own) / sum(d.passes for d in own)
        ),
        "difference": None,
        "its standard error": None,
    }
    if rival is not None:
        other, residual_of_other = _rate(rival)
        row["difference"] = rate - other
        row["its standard error"] = _standard_error(residual - residual_of_other)
    return row


def _rate(done: Sequence[Decoded]) -> tuple[float, np.ndarray]:
    """Tokens over passes, both summed, and each prompt's part ``[prompts]`` in its deviation
    (the linearised ratio estimator)."""
    tokens = np.array([len(d.tokens) for d in done])
    passes = np.array([d.passes for d in done])
    rate = tokens.sum() / passes.sum()
    return float(rate), (tokens - rate * passes) / passes.mean()


def _standard_error(residual: np.ndarray) -> float | None:
    if len(residual) < 2:
        return None
    return float(np.std(residual, ddof=1) / math.sqrt(len(residual)))
