"""A text round by round: what each round's tree was, and what the oracle thought of each token.

``generate`` runs all rounds in one compiled loop, of which only the text comes out. Here the
same rounds are run one at a time, which is slower and shows everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax import program_cache
from ssd_jax.batch import bucket, first_state
from ssd_jax.decode import (
    RUNNING,
    expecting,
    plain_step,
    prefill,
    prepared,
    settled,
    speculates,
    speculative_step,
)
from ssd_jax.generate import encode_prompt
from ssd_jax.gpt2 import GPT2
from ssd_jax.plan import Capacities, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack

_prefill = jax.jit(prefill, static_argnames="capacities")
_prepared = jax.jit(prepared, static_argnames="capacities")
_step = jax.jit(speculative_step, static_argnames="capacities")


@partial(jax.jit, static_argnames="capacities")
def _rest(models, tables, state, sampling, policy, capacities):
    state, tree, verdict = plain_step(models, tables, settled(state), sampling, policy, capacities)
    return expecting(state, capacities), tree, verdict


def round_trees(
    stack: Stack,
    prompt: str | Sequence[int],
    plan: Plan,
    *,
    rounds: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[list[dict[str, Any]]]:
    """The trees of the first rounds, one list of nodes each, parents before children.

    Args:
      stack: with a tokenizer.
      prompt, seed, options: as for :func:`ssd_jax.generate.generate`.
      plan: what drafts.
      rounds: how many; by default all that ``max_new_tokens`` take.
      max_new_tokens: where the text ends; by default not before the rounds do.

    Returns:
      Nodes, the root first. A node has ``parent`` (its index, -1 for the root's), ``token`` (its
      text), ``stage``, ``probability`` (of its path, as the drafts see it), ``evaluated`` (in the
      oracle's pass), ``accepted``.
    """
    tokens = encode_prompt(stack, prompt)
    context = stack.oracle.config.n_positions
    if max_new_tokens is None:
        max_new_tokens = context if rounds is None else rounds * (plan.depth + 1)
    models = (stack.oracle, *stack.drafts[: len(plan.drafts)])
    limit = min(len(tokens) + max_new_tokens, context)
    capacities = Capacities.of(plan, bucket(limit))
    state = first_state(models, [tokens], [limit], stack.eos_ids, capacities)
    sampling, policy = jax.device_put((Sampling.create(1, seed=seed, **options), Policy.of(plan)))
    tables = stack.tables if plan.uses_trigram else None
    names = (*stack.stage_names[: len(models)], "ngram")
    found = []
    with program_cache.keeping():
        state = _prefill(models, tables, state, sampling, policy, capacities)
        while int(state.finish[0]) == RUNNING and len(found) != rounds:
            step, root = _step, capacities.trunk - 1
            if capacities.rests:
                state = _prepared(models, tables, state, sampling, policy, capacities)
                if not speculates(state, capacities):
                    step, root = _rest, 0
            state, tree, verdict = step(models, tables, state, sampling, policy, capacities)
            tree, verdict = jax.device_get((tree, verdict))
            found.append(_nodes(stack, names, tree, verdict, root))
    return found


def _nodes(stack: Stack, names, tree, verdict, root: int) -> list[dict[str, Any]]:
    assert stack.tokenizer is not None
    kept = [int(i) for i in np.flatnonzero(np.isfinite(tree.log_prob[0])) if i >= root]
    index = {node: place for place, node in enumerate(kept)}
    accepted = set(verdict.path[0, : int(verdict.accepted[0]) + 1].tolist())
    return [
        {
            "parent": index.get(int(tree.parent[0, node]), -1),
            "token": stack.tokenizer.decode([int(tree.token[0, node])]),
            "stage": names[int(tree.origin[0, node])],
            "probability": round(float(np.exp(tree.value[0, node])), 6),
            "evaluated": bool(verdict.evaluated[0, node]),
            "accepted": node in accepted,
        }
        for node in kept
    ]


def oracle_view(
    stack: Stack, prompt: Sequence[int], tokens: Sequence[int]
) -> list[tuple[float, int]]:
    """What the oracle, at temperature 1, thought of each token of a continuation.

    Args:
      stack: whose oracle is asked, in one pass over the whole text.
      prompt: its token ids, at least one.
      tokens: the continuation's.

    Returns:
      For each token its probability, and its rank among all tokens (1 is the likeliest).
    """
    text = np.array([*prompt, *tokens], np.int32)
    # Causal: what the padding holds is not looked at.
    size = min(bucket(len(text)), stack.oracle.config.n_positions)
    padded = np.pad(text, (0, size - len(text)))[None]
    with program_cache.keeping():
        probability, rank = jax.device_get(_view(stack.oracle, padded))
    own = slice(len(prompt) - 1, len(text) - 1)
    return list(zip(probability[own].tolist(), rank[own].tolist(), strict=True))


@jax.jit
def _view(model: GPT2, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[1, T]`` int32 -> probability and rank of each but the first, both ``[T - 1]``."""
    scores = model(text)[0][0, :-1]
    own = jnp.take_along_axis(scores, text[0, 1:, None], axis=1)
    probability = jnp.exp(own[:, 0] - jax.nn.logsumexp(scores, axis=1))
    return probability, 1 + jnp.sum(scores > own, axis=1)
