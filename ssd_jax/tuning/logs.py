"""What every draft says about the tree below every token of a text that the oracle wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax import decode as engine
from ssd_jax import stages
from ssd_jax import tree as trees
from ssd_jax.batch import first_state
from ssd_jax.errors import PlanError
from ssd_jax.ngram import NGramTables
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.sampling import Sampling, best_few, gumbel_noise, scores
from ssd_jax.stack import Stack

LISTED = 16  # continuations kept of each distribution
DEPTH = 16  # deepest level that is logged

# A node's context: how many tokens of the text come before it, and those beside the text.
Context = tuple[int, tuple[int, ...]]


def generous(drafts: int, ngram: bool) -> Plan:
    """The plan whose trees are logged: wide, deep, and drafted for until little is left."""
    # All passes of a draft together have room for the whole tree, and so does one wide pass in
    # their place. Several drafts multiply each other's rounds.
    rounds = 6 if drafts < 2 else 3
    draft = DraftPlan(rounds=rounds, width=96 // rounds, branch=5, threshold=0.01)
    return Plan(
        width=1,
        drafts=(draft,) * drafts,
        ngram=NGramPlan(levels=3, width=4, branch=2 if ngram else 0, match=8),
        depth=DEPTH,
        nodes=95,
        floor=2e-3,
    )


@dataclasses.dataclass(frozen=True)
class TextLog:
    """One text of the oracle, and what a replay must know to draft it again.

    Attributes:
      tokens: prompt and continuation.
      start: length of the prompt.
      limit: the length at which the text had to end.
      context: the longest text that each draft can read.
      eos: end-of-text ids.
      temperature: 0 where the text is greedy.
      taus: by which each draft's scores were divided.
      distributions: of each draft, by context: the best ``LISTED`` continuations with their
        log-probabilities (``log_softmax`` of the draft's scores, noise included), best first.
      noise: ``[T, V]`` float32, of the positions from ``start`` on; empty where greedy.
      tables: the trigram, or ``None``.
    """

    tokens: tuple[int, ...]
    start: int
    limit: int
    context: tuple[int, ...]
    eos: frozenset[int]
    temperature: float
    taus: tuple[float, ...]
    distributions: tuple[dict[Context, dict[int, float]], ...]
    noise: np.ndarray
    tables: NGramTables | None

    def check_taus(self, plan: Plan) -> None:
        """Raise :class:`PlanError` if the log does not hold for a plan's drafts."""
        pairs = zip(plan.drafts, self.taus, strict=False)
        for number, (draft, tau) in enumerate(pairs, 1):
            own = draft.tau_sampled if self.temperature else draft.tau_greedy
            if own != tau:
                raise PlanError(
                    f"draft {number} was logged with tau {tau:g}, and the plan has {own:g}; "
                    "log the text with the plan's taus"
                )

    def below(self, context: Context, token: int) -> Context:
        """The context of a child."""
        known, beside = context
        if not beside and known < len(self.tokens) and self.tokens[known] == token:
            return known + 1, ()
        return known, (*beside, token)


def log_text(
    stack: Stack,
    tokens: Sequence[int],
    start: int,
    limit: int,
    sampling: Sampling,
    *,
    capacity: int,
    plan: Plan | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> TextLog:
    """Log a text, position by position.

    The tree below each token is grown by all stages under a generous plan; then every draft
    evaluates all of it in one pass.

    Args:
      stack: the stack.
      tokens: prompt and what the oracle wrote after it.
      start: length of the prompt.
      limit: the length at which the text had to end.
      sampling: one row, as the text was written.
      capacity: text that the buffers hold, at least ``limit``; a new one compiles anew.
      plan: what grows the trees, by default :func:`generous`; the log is of its drafts' taus.
      on_share: told after every position, which share of them is over.
    """
    plan = plan or generous(len(stack.drafts), stack.ngram is not None)
    capacities = Capacities.of(plan, capacity)
    models = (stack.oracle, *stack.drafts)
    state = first_state(models, [tokens], [limit], stack.eos_ids, capacities)
    # A whole text is finished where it ends; the trees below its tokens are not.
    state = dataclasses.replace(
        state, finish=jnp.zeros_like(state.finish), start=jnp.full_like(state.start, start)
    )
    arguments = (models, stack.tables, sampling, Policy.of(plan))
    state = _prefill(*arguments, state, capacities)
    temperature = 0.0 if sampling.draw is None else float(sampling.draw.temperature[0])
    log = TextLog(
        tokens=tuple(tokens),
        start=start,
        limit=limit,
        context=tuple(draft.config.n_positions for draft in stack.drafts),
        eos=frozenset(stack.eos_ids),
        temperature=temperature,
        taus=tuple(d.tau_sampled if temperature else d.tau_greedy for d in plan.drafts),
        distributions=tuple({} for _ in stack.drafts),
        noise=_noise(sampling, start, len(tokens) + DEPTH + 1, stack.vocab_size),
        tables=stack.tables,
    )
    for length in range(start, len(tokens)):
        found = _below(*arguments, state, jnp.full((1,), length, jnp.int32), capacities)
        _record(log, length, *jax.device_get(found))
        on_share((length + 1 - start) / (len(tokens) - start))
    return log


def _noise(sampling: Sampling, start: int, end: int, vocab: int) -> np.ndarray:
    if sampling.draw is None:
        return np.zeros((0, vocab), np.float32)
    return np.asarray(gumbel_noise(sampling.draw, jnp.arange(start, end)[None], vocab)[0])


@partial(jax.jit, static_argnames="capacities", donate_argnames="state")
def _prefill(models, tables, sampling, policy, state, capacities) -> engine.DecodeState:
    """Fill the drafts' caches with the whole text. What lies above a cache's ``length`` is not
    attended to, so any shorter text is then at hand by setting that."""
    rnd = engine.new_round(models, tables, state, sampling, policy, capacities)
    filled = [
        stages.catch_up(rnd, model, cache, 1)[0]
        for model, cache in enumerate(state.caches[1:], start=1)
    ]
    return dataclasses.replace(state, caches=(state.caches[0], *filled))


@partial(jax.jit, static_argnames="capacities")
def _below(models, tables, sampling, policy, state, length, capacities):
    """The generous tree below the first ``length`` tokens, and what the drafts say about it.

    Returns:
      Tokens, parents and validity ``[N']`` of the nodes from the root on (parents are counted
      from the root), and the best continuations of each node by each draft, tokens and
      log-probabilities ``[M - 1, N', LISTED]``.
    """
    state = dataclasses.replace(state, length=length)
    rnd = engine.new_round(models, tables, state, sampling, policy, capacities)
    caches = tuple(
        dataclasses.replace(cache, length=jnp.minimum(length - 1, model.config.n_positions))
        for cache, model in zip(state.caches[1:], models[1:], strict=True)
    )
    tree, _ = stages.grow(rnd, 1, engine.plant(rnd, caches), caches)
    tree = trees.unevaluated(tree)
    root = capacities.trunk - 1
    nodes = jnp.arange(root, capacities.nodes)[None]
    rows = jnp.arange(capacities.nodes)[None] - root
    hit = tree.valid & (rows >= 0)
    entry = rnd.noise_after(tree, nodes)
    listed_tokens, listed_logs = [], []
    for model, cache in enumerate(caches, 1):
        logits, *_ = stages.evaluate(rnd, model, tree, cache, nodes, rows, hit)
        logits = stages.processed(rnd, tree, nodes, logits)
        scored = scores(logits, rnd.noise, entry, sampling.draw, rough=True)
        log_prob = jax.nn.log_softmax(scored / rnd.tau(model)[:, None, None], axis=-1)
        best, token = best_few(log_prob, min(LISTED, log_prob.shape[-1]))
        listed_tokens.append(token[0])
        listed_logs.append(best[0])
    tree = jax.tree.map(lambda field: field[0], (tree.token, tree.parent, tree.valid))
    token, parent, valid = (field[root:] for field in tree)
    return token, parent - root, valid, listed_tokens, listed_logs


def _record(log: TextLog, length: int, token, parent, valid, listed, logs) -> None:
    contexts: list[Any] = [(length, ())]
    for node in range(1, len(token)):
        known = contexts[parent[node]] if valid[node] else None
        contexts.append(None if known is None else log.below(known, int(token[node])))
    for own, tokens, log_probs in zip(log.distributions, listed, logs, strict=True):
        for node, context in enumerate(contexts):
            # Nodes too deep to have children are of no use; the trees of later tokens hold those
            # on the text again.
            if context is not None and context not in own:
                pairs = zip(tokens[node].tolist(), log_probs[node].tolist(), strict=True)
                own[context] = {t: lp for t, lp in pairs if lp > -np.inf}
