"""Comparisons that a trio's settings are chosen by. Each returns the rows of a table."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.ngram import KatzModel
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import loop, sample
from ssd_jax.training.config import ModelConfig, SampleConfig, TrainConfig
from ssd_jax.training.surgery import in_float32
from ssd_jax.training.tokens import TokenFile

WHOLE = "training text, all of it"
CHAIN = 4  # drafted tokens of the chain that acceptance is reckoned for

Row = dict[str, Any]
Say = Callable[[str], None]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with the keys of the first row as its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- What the trigram is counted on ------------------------------------------------------


def corpora(
    oracle: GPT2,
    draft: GPT2,
    text: Path,
    work: Path,
    *,
    temperatures: Sequence[float],
    shards: int,
    seed: int,
    tokenizer: Tokenizer,
    limits: dict[str, Any],
    say: Say = print,
) -> list[Row]:
    """Trigrams counted on as many tokens of each kind of text, and how often they are right.

    The kinds: the draft's samples at each temperature (the paper takes 1.5), the oracle's greedy
    continuations of training text, and the training text. The last costs nothing to draw, so
    there is a row for all of it too, pruned to what would be shipped. Judged on text that the
    oracle writes, greedy and at temperature 1, going on from held-out text: the share of its
    tokens that a look-up's best guess, or one of its best four, had right. That share is the
    number of accepted tokens of a look-up one token long.

    Args:
      oracle, draft: the models.
      text: folder of the encoded splits.
      work: keeps what was drawn, so that an interrupted comparison goes on.
      temperatures: of the draft's samples.
      shards: of 64 rows of 256 tokens each, for every corpus.
      seed: of all draws.
      tokenizer: the models'.
      limits: further arguments of :meth:`KatzModel.fit` for the whole training text.
      say: receives progress.
    """
    train, heldout = TokenFile(text, "train"), TokenFile(text, "heldout")
    rows = SampleConfig(shards=shards, batch=64, length=256)

    def drawn(name: str, model: GPT2, source: TokenFile, settings: SampleConfig):
        folder = work / name
        prompts = sample.Prompts(settings, source, tokenizer, seed)
        sample.draw_shards(
            model, settings, folder, prompts, seed=seed, say=lambda line: say(f"{name}: {line}")
        )
        return list(sample.sampled_documents(folder, settings, cast(int, tokenizer.eos_token_id)))

    kinds: dict[str, list[np.ndarray]] = {
        f"draft's samples, T={t:g}": drawn(
            f"draft-{t:g}", draft, train, dataclasses.replace(rows, temperature=t)
        )
        for t in temperatures
    }
    greedy = dataclasses.replace(rows, temperature=0.0, prompt=64)
    kinds["oracle's greedy text"] = drawn("oracle-greedy", oracle, train, greedy)
    size = sum(map(len, next(iter(kinds.values()))))
    everything = list(train.texts())
    kinds["training text"] = _some_of(everything, size, seed)
    kinds[WHOLE] = everything
    few = dataclasses.replace(greedy, shards=1, length=128)
    judges = {
        "greedy": drawn("judge-greedy", oracle, heldout, few),
        "T=1": drawn("judge-sampled", oracle, heldout, dataclasses.replace(few, temperature=1.0)),
    }
    table = []
    for name, documents in kinds.items():
        bounds = limits if name == WHOLE else {}
        model = KatzModel.fit(documents, oracle.config.vocab_size, **bounds)
        row: Row = {
            "counted on": name,
            "tokens": f"{sum(map(len, documents)):,}",
            "trigrams": f"{model.sizes[2]:,}",
        }
        for judge, own in judges.items():
            one, *_, four = model.hit_rates(own, 4)
            row |= {f"{judge}, guess": f"{one:.1%}", f"{judge}, best 4": f"{four:.1%}"}
        table.append(row | {"perplexity": f"{model.perplexity(heldout.texts()):.0f}"})
    return table


def _some_of(documents: list[np.ndarray], tokens: int, seed: int) -> list[np.ndarray]:
    """Random whole documents of about so many tokens."""
    order = np.random.default_rng(seed).permutation(len(documents))
    sizes = np.cumsum([len(documents[i]) for i in order])
    return [documents[i] for i in order[: 1 + np.searchsorted(sizes, tokens)]]


# --- The draft's shape -------------------------------------------------------------------


def shapes(
    oracle: GPT2,
    candidates: Sequence[ModelConfig],
    settings: TrainConfig,
    text: Path,
    work: Path,
    *,
    sizes: np.ndarray,
    seed: int,
    end_of_text: int,
    say: Say = print,
) -> list[Row]:
    """Drafts of several shapes, trained alike, by what they accept and what a pass costs.

    "Accepted" is the mean number of tokens of a chain of :data:`CHAIN` that the oracle would
    take on held-out text: greedy, where both find the same tokens likeliest; sampled, from the
    overlap of the two distributions. "Speed" divides the tokens of a round by its cost in
    oracle passes, with passes timed alone on this device, one row each over a cache of 256.

    Args:
      oracle: what they learn from.
      candidates: the shapes.
      settings: how each is trained.
      text: folder of the encoded splits.
      work: keeps the training runs, so that an interrupted comparison goes on.
      sizes: ``[V]``, bytes of each token.
      seed: of initial weights and batches.
      end_of_text: id of the token.
      say: receives progress.
    """
    trained: list[tuple[str, GPT2]] = []
    for shape in candidates:
        name = f"{shape.n_layer}x{shape.n_embd}"
        config = shape.gpt2(oracle.config.vocab_size, end_of_text)
        trainer = loop.Trainer(config, settings, teacher=oracle, seed=seed)
        state = loop.train(
            trainer, text, work / name, say=lambda line, name=name: say(f"{name}: {line}")
        )
        trained.append((name, in_float32(trainer.model(state))))
    seconds = pass_seconds([in_float32(oracle), *(model for _, model in trained)])
    heldout = TokenFile(text, "heldout")
    table = []
    for (name, model), cost in zip(trained, seconds[1:], strict=True):
        bits, greedy, sampled = _acceptance(oracle, model, heldout, sizes, settings.context)
        relative = cost / seconds[0]
        table.append(
            {
                "layers x width": name,
                "parameters": f"{parameter_count(model) / 1e6:.2f}M",
                "bits per byte": f"{bits:.3f}",
                f"accepted of {CHAIN}, greedy": f"{greedy:.2f}",
                "T=1": f"{sampled:.2f}",
                "ms a pass": f"{1e3 * cost:.2f}",
                "of the oracle's": f"{relative:.2f}",
                "speed, greedy": f"{(1 + greedy) / (1 + CHAIN * relative):.2f}",
                "speed, T=1": f"{(1 + sampled) / (1 + CHAIN * relative):.2f}",
            }
        )
    return table


def parse_shape(text: str, positions: int, head_dim: int = 32) -> ModelConfig:
    """``2x96`` as a shape of 2 layers and 96 channels.

    Raises:
      ConfigError: it is none.
    """
    layers, _, width = text.partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise ConfigError(f"a shape reads LAYERSxWIDTH, for instance 2x96, not {text!r}")
    heads = max(1, int(width) // head_dim)
    return ModelConfig(int(width), int(layers), heads, n_positions=positions)


def pass_seconds(models: Sequence[GPT2], slots: int = 256, repeats: int = 30) -> list[float]:
    """Median time of a one-row pass of each model, measured in turns over a cache of ``slots``."""

    def one_pass(model, token, cache):
        mask = jnp.ones((1, 1, slots), bool)
        logits, cache = model(token, token, mask=mask, cache=cache, offset=slots - 1)
        return logits.argmax(-1).astype(jnp.int32), cache

    # The cache is given up and taken back, as in a decode loop, so that none is copied.
    run = jax.jit(one_pass, donate_argnums=2)
    states = [(jnp.ones((1, 1), jnp.int32), model.init_cache(1, slots)) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for turn, (index, model) in itertools.product(range(repeats + 2), enumerate(models)):
        start = time.perf_counter()
        states[index] = jax.block_until_ready(run(model, *states[index]))
        if turn >= 2:  # the first compiles
            times[index].append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _acceptance(
    oracle: GPT2, draft: GPT2, heldout: TokenFile, sizes: np.ndarray, context: int
) -> tuple[float, float, float]:
    """Bits per byte of the draft, and accepted tokens of a chain, greedy and sampled."""

    @jax.jit
    def measure(oracle, draft, tokens):
        log_p, log_q = (jax.nn.log_softmax(m(tokens[:, :-1])[0]) for m in (oracle, draft))
        nats = -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1).sum()
        same = (log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32)
        return nats, same, jnp.exp(jnp.minimum(log_p, log_q)).sum(-1)

    nats = bytes_ = 0.0
    chains: tuple[list[float], list[float]] = ([], [])
    for rows in _batches(heldout, context):
        total, *rates = measure(oracle, draft, rows)
        nats += float(total)
        bytes_ += float(sizes[rows[:, 1:]].sum())
        for own, rate in zip(chains, rates, strict=True):
            own.append(chain_length(np.asarray(rate), CHAIN))
    greedy, sampled = (float(np.mean(own)) for own in chains)
    return nats / np.log(2) / bytes_, greedy, sampled


def _batches(tokens: TokenFile, context: int, batch: int = 8, windows: int = 128) -> Iterator:
    starts = tokens.spread(context, windows)
    for first in range(0, len(starts) - batch + 1, batch):
        yield tokens.read(starts[first : first + batch], context)


def chain_length(rates: np.ndarray, length: int) -> float:
    """Mean accepted tokens of chains of ``length`` begun at every position of ``[B, T]`` rates.

    ``rates`` are the probabilities that the token drafted at each position is accepted.
    """
    windows = np.lib.stride_tricks.sliding_window_view(rates, length, axis=1)
    return float(np.cumprod(windows, axis=-1).sum(axis=-1).mean())
