"""Slow, obvious implementations that the tests hold the engine to."""

from __future__ import annotations

import jax
import jax.extend.random  # noqa: F401
import jax.numpy as jnp
import numpy as np

from ssd_jax.gpt2 import GPT2


def warp(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None):
    """One row of logits to float64 log-weights, by sorting (the definition of
    ``transformers``: temperature, then top-k, then top-p)."""
    out = logits.astype(np.float64) / (temperature or 1.0)
    if temperature == 0:
        return out
    if top_k:
        kth = np.sort(out)[::-1][min(top_k, len(out)) - 1]
        out = np.where(out < kth, -np.inf, out)
    if top_p is not None and top_p < 1.0:
        order = np.argsort(-out, kind="stable")
        probs = np.exp(out[order] - out.max())
        probs /= probs.sum()
        before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])
        out[order[before >= top_p]] = -np.inf
    return out


def gumbel(seed: int, position: int, vocab: int) -> np.ndarray:
    """The noise of one position, from JAX's own threefry."""
    from jax.extend.random import threefry2x32_p

    words = [np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF)]
    tokens = np.arange(vocab, dtype=np.uint32)
    inputs = [np.full(vocab, x, np.uint32) for x in (*words, np.uint32(position))]
    bits, _ = threefry2x32_p.bind(*map(jnp.asarray, inputs), jnp.asarray(tokens))
    uniform = (np.asarray(bits).astype(np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log1p(-np.minimum(uniform, 1 - 2.0**-24)))


def generate(
    model: GPT2,
    prompt: list[int],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    adjust=lambda text, logits: logits,
) -> tuple[list[int], float]:
    """Cache-free decoding, a whole forward pass for each token; ``adjust`` sees text and logits.

    Returns:
      The new tokens and the smallest margin between a chosen token and the runner-up.
    """
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    text, margin = list(prompt), np.inf
    context = model.config.n_positions
    while len(text) < min(len(prompt) + new_tokens, context):
        padded = np.zeros((1, context), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(forward(model, jnp.asarray(padded))[0, len(text) - 1])
        score = warp(adjust(text, logits), temperature, top_k, top_p)
        if temperature:
            score = score + gumbel(seed, len(text), len(score))
        first, second = np.sort(score)[::-1][:2]
        margin = min(margin, first - second)
        text.append(int(np.argmax(score)))
        if text[-1] in eos:
            break
    return text[len(prompt) :], margin
