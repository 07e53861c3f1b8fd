"""What training makes smaller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ssd_jax.gpt2 import GPT2
from ssd_jax.training.config import TrainConfig
from ssd_jax.training.tokens import Batch


def kl_divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Mean ``KL(teacher || student)`` in nats between two ``[B, T, V]`` float32 logits.

    The direction makes the student cover what the teacher may say, which is what a draft is
    for (Hinton et al., 2015).
    """
    log_p = jax.nn.log_softmax(teacher)
    log_q = jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()


DRAWN_FROM = 50  # of the oracle's likeliest tokens, as a sampled text is in the paper


def same_draw(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Mean probability that two distributions, with one noise, draw the same token.

    The noise is Gumbel's, at temperature 1, as where a draft proposes what the oracle will draw. A
    token wins in both with probability ``1 / sum_j max(p_j / p_i, q_j / q_i)`` (Daliri et al.,
    2024, "Coupling without communication and drafter-invariant speculative decoding"); a
    divergence bounds that, and a small student cannot have it small everywhere.

    Args:
      teacher, student: ``[B, T, V]`` float32 logits; the teacher draws from its
        :data:`DRAWN_FROM` likeliest tokens, the student from all.
    """
    few = min(DRAWN_FROM, teacher.shape[-1])
    likeliest, tokens = lax.top_k(teacher, few)
    log_p = jax.nn.log_softmax(likeliest)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(student), tokens, axis=-1)

    def over(log_ratio: jax.Array) -> jax.Array:
        return jnp.exp(jnp.minimum(log_ratio, 60.0))  # finite; who loses by that much never wins

    def beside(log_prob: jax.Array) -> jax.Array:
        """``[..., i, j]``: of token j over token i."""
        return log_prob[..., None, :] - log_prob[..., :, None]

    rivals = over(jnp.maximum(beside(log_p), beside(log_q))).sum(-1)
    elsewhere = jnp.maximum(1 - jnp.exp(log_q).sum(-1, keepdims=True), 0)
    return (1 / (rivals + elsewhere * over(-log_q))).sum(-1).mean()


def loop_loss(nats: jax.Array, loops: jax.Array) -> jax.Array:
    """What is wrong with the probabilities of tokens that only repeat, ``[B, T]``.

    A token of a loop should have half the probability that it had one turn before: the loss is
    ``-log(1 - |p - p_before / 2|)`` (Xu et al., 2022, "Learning to break the loop").
    A model trained on text alone makes a sentence likelier every time it is repeated, and
    greedy decoding then never leaves it.

    Args:
      nats: ``[B, T]`` float32, negative log-likelihood of each predicted token.
      loops: ``[B, T]`` int32, positive for tokens of a loop: how far back is the token that each
        repeats. Elsewhere the result means nothing.
    """
    # In range for every token: a masked NaN would still reach the gradient.
    before = jnp.clip(jnp.arange(nats.shape[1]) - loops, 0, nats.shape[1] - 1)
    likelihood = jnp.exp(-nats)
    wanted = lax.stop_gradient(jnp.take_along_axis(likelihood, before, axis=1)) / 2
    return -jnp.log1p(-jnp.minimum(jnp.abs(likelihood - wanted), 1 - 1e-6))


def losses(
    model: GPT2, teacher: GPT2 | None, batch: Batch, settings: TrainConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a step makes smaller, and its parts by name: of a model that learns from text alone, or
    from a ``teacher``, or from both, as ``settings`` say."""
    tokens, positions, loops = (jnp.asarray(array) for array in batch)
    logits, _ = model(tokens[:, :-1], positions)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    count = jnp.maximum(jnp.sum(loops == 0, dtype=nats.dtype), 1)
    metrics = {"cross_entropy": jnp.sum(jnp.where(loops == 0, nats, 0.0)) / count}
    if teacher is None:
        repeated = jnp.where(loops > 0, loop_loss(nats, loops), 0.0)
        return metrics["cross_entropy"] + repeated.sum() / count, metrics
    wanted = lax.stop_gradient(teacher(tokens[:, :-1], positions)[0])
    metrics["kl"] = apart = kl_divergence(wanted, logits)
    if settings.coupling:
        metrics["same_draw"] = same_draw(wanted, logits)
        apart = (1 - settings.coupling) * apart + settings.coupling * (1 - metrics["same_draw"])
    weight = settings.data_weight
    return weight * metrics["cross_entropy"] + (1 - weight) * apart, metrics
