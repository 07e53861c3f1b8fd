"""Texts to look at: who proposed each token, and what the first rounds' trees were."""

from __future__ import annotations

from typing import Any

from ssd_jax.generate import generate
from ssd_jax.plan import Plan
from ssd_jax.rounds import round_trees
from ssd_jax.show import pieces
from ssd_jax.stack import Stack


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
      ``trees``, the first rounds (:func:`~ssd_jax.rounds.round_trees`); ``tokens_per_oracle_pass``.
    """
    result = generate(stack, prompt, plan=plan, max_new_tokens=max_new_tokens, seed=seed, **options)
    return {
        "prompt": prompt,
        "pieces": list(zip(pieces(stack, result.tokens), result.origins, strict=True)),
        "trees": round_trees(stack, prompt, plan, rounds=rounds, seed=seed, **options),
        "tokens_per_oracle_pass": result.stats.tokens_per_oracle_pass,
    }
