"""What was trained, measured on held-out text and written up as a model card."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training.config import Config, SampleConfig
from ssd_jax.training.tokens import TokenFile, token_bytes, write_split


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model on held-out text, and how it agrees with the oracle there.

    Attributes:
      tokens: tokens predicted.
      bits: bits per byte (UTF-8).
      agreement: share of positions where it and the oracle find the same token likeliest.
      overlap: mean over positions of the sum of the smaller of the two probabilities, which is
        what speculative sampling accepts (Leviathan et al., 2023).
    """

    tokens: int
    bits: float
    agreement: float
    overlap: float


def window(models: Mapping[str, GPT2]) -> int:
    """Tokens of a measured window: the same for every run, so that runs compare."""
    return min(512, *(model.config.n_positions for model in models.values()))


def _compare(models: dict[str, GPT2], tokens: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Sums over one batch of windows, tokens ``[B, T + 1]`` int32, by model."""
    log_probs = {
        name: jax.nn.log_softmax(model(tokens[:, :-1])[0]) for name, model in models.items()
    }
    log_p = log_probs["oracle"]
    targets = tokens[:, 1:, None]
    return {
        name: {
            "nats": -jnp.take_along_axis(log_q, targets, axis=-1).sum(),
            "agreement": jnp.sum(log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32),
            "overlap": jnp.exp(jnp.minimum(log_p, log_q)).sum(),
        }
        for name, log_q in log_probs.items()
    }


def compare(
    models: dict[str, GPT2],
    tokens: TokenFile,
    sizes: np.ndarray,
    *,
    context: int,
    windows: int = 1024,
    batch: int = 8,
) -> dict[str, Quality]:
    """All models over evenly spread held-out windows, each seen from its first token on.

    Args:
      models: by name; ``oracle`` is what the others are compared with.
      tokens: the held-out split.
      sizes: ``[V]``, bytes of each token.
      context: tokens a window.
      windows: how many at most.
      batch: windows a pass.

    Raises:
      DataError: the split does not fill one window.
    """
    starts = tokens.spread(context, windows)
    compare_batch = jax.jit(_compare)
    sums = {name: {"nats": 0.0, "agreement": 0.0, "overlap": 0.0} for name in models}
    for first in range(0, len(starts), batch):
        rows = tokens.read(starts[first : first + batch], context)
        for name, values in compare_batch(models, rows).items():
            for key, value in values.items():
                sums[name][key] += float(value)
    targets = tokens.read(starts, context)[:, 1:]
    bits = math.log(2) * int(sizes[targets].sum())
    return {
        name: Quality(
            tokens=targets.size,
            bits=total["nats"] / bits,
            agreement=total["agreement"] / targets.size,
            overlap=total["overlap"] / targets.size,
        )
        for name, total in sums.items()
    }


def compare_on(
    models: dict[str, GPT2], texts: Sequence[str], tokenizer: Tokenizer
) -> dict[str, Quality]:
    """:func:`compare` on some texts.

    Raises:
      DataError: they do not fill one window.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save(folder)
        write_split(folder, "heldout", texts, tokenizer)
        sizes = token_bytes(folder / "tokenizer.json")
        return compare(models, TokenFile(folder, "heldout"), sizes, context=window(models))


def run_record(config: Config, name: str, log: list[dict]) -> dict[str, Any]:
    """What one model's run was, for ``training.json``: JSON types only."""
    settings = config.training(name)
    return {
        "init": config.model(name).init or "random weights",
        "seed": config.seed,
        "steps": log[-1]["step"],
        "tokens": sum(int(row["tokens"]) for row in log),
        "optimizer": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "data_weight": settings.data_weight if name != "oracle" else 1.0,
        "coupling": settings.coupling if name != "oracle" else 0.0,
    }


def _loss(run: dict[str, Any]) -> str:
    """A run's loss, in words."""
    data, coupling = run["data_weight"], run.get("coupling", 0.0)  # earlier runs knew none
    parts = {
        "cross-entropy": data,
        "KL from the oracle": (1 - data) * (1 - coupling),
        "draws apart from it": (1 - data) * coupling,
    }
    if data == 1:
        return "cross-entropy"
    return " + ".join(f"{weight:g} x {what}" for what, weight in parts.items() if weight)


def model_card(
    config: Config,
    data: dict,
    models: dict[str, GPT2],
    runs: dict[str, list[dict]],
    quality: dict[str, Quality],
    perplexity: float,
    ngram_sizes: tuple[int, int, int],
) -> str:
    """The trio's README, in Markdown.

    Args:
      config: the run.
      data: the data card, ``data.json``.
      models: by name, the oracle first.
      runs: each model's runs (:func:`run_record`), the last one this config's.
      quality: each model's measurements on held-out text.
      perplexity: of the trigram, on the whole held-out split.
      ngram_sizes: distinct uni-, bi- and trigrams.
    """
    template = importlib.resources.files("ssd_jax.training").joinpath("card.md.j2")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        config=config,
        data=data,
        models=models,
        parameters={name: parameter_count(model) for name, model in models.items()},
        runs=runs,
        quality=quality,
        perplexity=perplexity,
        ngram_sizes=ngram_sizes,
        window=window(models),
        loss=_loss,
        counted=" and ".join(_described(config, name) for name in config.ngram.corpus),
    )


def _described(config: Config, corpus: str) -> str:
    """What the n-gram was counted on, in words."""
    if corpus == "train":
        return "the training text"
    drawn: SampleConfig = getattr(config, corpus)
    begun = ", from functions' signatures and docstrings on" if drawn.functions else ""
    cut = f", top-k {drawn.top_k}" if drawn.top_k else ""
    greedy = f" ({drawn.greedy:.0%} of it greedy)" if drawn.greedy else ""
    return (
        f"text drawn from the {drawn.model} at temperature {drawn.temperature:g}{cut}{greedy}"
        f"{begun} ({drawn.shards * drawn.batch:,} rows of at most {drawn.length} tokens"
        + (f", counted {repeats} times)" if (repeats := config.ngram.drawn_repeats) > 1 else ")")
    )
