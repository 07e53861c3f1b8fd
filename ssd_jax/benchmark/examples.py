"""Texts and trees to look at: who proposed each token, and what a round's tree was."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ssd_jax.batch import bucket, first_state
from ssd_jax.decode import RUNNING, prefill, speculative_step
from ssd_jax.generate import encode_prompt, generate
from ssd_jax.plan import Capacities, Plan, Policy
from ssd_jax.sampling import Sampling
from ssd_jax.show import pieces
from ssd_jax.stack import Stack

_prefill = jax.jit(prefill, static_argnames="capacities")
_step = jax.jit(speculative_step, static_argnames="capacities")


def example(
    stack: Stack,
    prompt: str,
    plan: Plan,
    *,
    max_new_tokens: int,
    seed: int,
    rounds: int,
    **options: Any,
) -> dict[str, Any]:
    """One continuation for the report.

    Args:
      stack: with a tokenizer.
      prompt: its text.
      plan: what drafts.
      max_new_tokens, seed, options: as for :func:`ssd_jax.generate`.
      rounds: how many of the first rounds' trees to keep.

    Returns:
      ``prompt``; ``pieces``, pairs of text and the name of the stage that proposed it;
      ``trees``, the first rounds (:func:`round_trees`); ``tokens_per_oracle_pass``.
    """
    result = generate(stack, prompt, plan=plan, max_new_tokens=max_new_tokens, seed=seed, **options)
    return {
        "prompt": prompt,
        "pieces": list(zip(pieces(stack, result.tokens), result.origins, strict=True)),
        "trees": round_trees(stack, prompt, plan, rounds=rounds, seed=seed, **options),
        "tokens_per_oracle_pass": result.stats.tokens_per_oracle_pass,
    }


def round_trees(
    stack: Stack, prompt: str, plan: Plan, *, rounds: int, seed: int = 0, **options: Any
) -> list[list[dict[str, Any]]]:
    """The trees of the first rounds, one list of nodes each, parents before children.

    The root is first. A node has ``parent`` (its index, -1 for the root's), ``token`` (its text),
    ``stage``, ``probability`` (of its path, as the drafts see it), ``evaluated`` (in the oracle's
    pass), ``accepted``.
    """
    tokens = encode_prompt(stack, prompt)
    models = (stack.oracle, *stack.drafts[: len(plan.drafts)])
    limit = min(len(tokens) + rounds * (plan.depth + 1), stack.oracle.config.n_positions)
    capacities = Capacities.of(plan, bucket(limit))
    state = first_state(models, [tokens], [limit], stack.eos_ids, capacities)
    sampling, policy = Sampling.create(1, seed=seed, **options), Policy.of(plan)
    tables = stack.tables if plan.uses_trigram else None
    state = _prefill(models, tables, state, sampling, policy, capacities)
    found = []
    for _ in range(rounds):
        if int(state.finish[0]) != RUNNING:
            break
        state, tree, verdict = _step(models, tables, state, sampling, policy, capacities)
        names = (*stack.stage_names[: len(models)], "ngram")
        tree, verdict = jax.device_get((tree, verdict))
        found.append(_nodes(stack, names, tree, verdict, root=capacities.trunk - 1))
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
