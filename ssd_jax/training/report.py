"""What was trained, measured on held-out text and written up as a model card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.training.config import Config
from ssd_jax.training.tokens import TokenFile


@dataclasses.dataclass(frozen=True)
class Quality:
    """A pair of models on held-out text.

    Attributes:
      tokens: tokens predicted.
      oracle_bits: bits per byte (UTF-8) of the oracle.
      draft_bits: the same of the draft.
      agreement: share of positions where both find the same token likeliest.
      overlap: mean over positions of the sum of the smaller of the two probabilities, which is
        what speculative sampling accepts (Leviathan et al., 2023).
    """

    tokens: int
    oracle_bits: float
    draft_bits: float
    agreement: float
    overlap: float


def window(config: Config) -> int:
    """Tokens of a measured window: the longest context trained on."""
    return max(config.train_oracle.context, config.train_oracle.long_context)


def _compare(oracle: GPT2, draft: GPT2, tokens: jax.Array) -> dict[str, jax.Array]:
    """Sums over one batch of windows, tokens ``[B, T + 1]`` int32."""
    log_p, log_q = (jax.nn.log_softmax(model(tokens[:, :-1])[0]) for model in (oracle, draft))
    targets = tokens[:, 1:, None]
    return {
        "oracle_nats": -jnp.take_along_axis(log_p, targets, axis=-1).sum(),
        "draft_nats": -jnp.take_along_axis(log_q, targets, axis=-1).sum(),
        "agreement": jnp.sum(log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32),
        "overlap": jnp.exp(jnp.minimum(log_p, log_q)).sum(),
    }


def compare(
    oracle: GPT2,
    draft: GPT2,
    tokens: TokenFile,
    sizes: np.ndarray,
    *,
    context: int,
    windows: int = 256,
    batch: int = 8,
) -> Quality:
    """Both models over evenly spread held-out windows, each seen from its first token on.

    Args:
      oracle, draft: the models.
      tokens: the held-out split.
      sizes: ``[V]``, bytes of each token.
      context: tokens a window.
      windows: how many at most.
      batch: windows a pass.

    Raises:
      DataError: the split does not fill one window.
    """
    starts = np.unique(tokens.windows(context))
    starts = starts[:: -(-len(starts) // windows)]
    compare_batch = jax.jit(_compare)
    sums: dict[str, float] = {}
    for first in range(0, len(starts), batch):
        rows = tokens.read(starts[first : first + batch], context)
        for name, value in compare_batch(oracle, draft, rows).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    targets = tokens.read(starts, context)[:, 1:]
    bits = math.log(2) * int(sizes[targets].sum())
    return Quality(
        tokens=targets.size,
        oracle_bits=sums["oracle_nats"] / bits,
        draft_bits=sums["draft_nats"] / bits,
        agreement=sums["agreement"] / targets.size,
        overlap=sums["overlap"] / targets.size,
    )


def model_card(
    config: Config,
    data: dict,
    models: dict[str, GPT2],
    logs: dict[str, list[dict]],
    quality: Quality,
    perplexity: float,
    ngram_sizes: tuple[int, int, int],
) -> str:
    """The trio's README, in Markdown.

    Args:
      config: the run.
      data: the data card, ``data.json``.
      models: ``oracle`` and ``draft``.
      logs: their training logs.
      quality: their measurements on held-out text.
      perplexity: of the trigram, on the whole held-out split.
      ngram_sizes: distinct uni-, bi- and trigrams.
    """
    shape = _table(
        ("", "parameters", "layers x width", "heads", "positions", "held-out bits per byte"),
        [
            (
                name,
                f"{parameter_count(model):,}",
                f"{model.config.n_layer} x {model.config.n_embd}",
                model.config.n_head,
                model.config.n_positions,
                f"{bits:.3f}",
            )
            for (name, model), bits in zip(
                models.items(), (quality.oracle_bits, quality.draft_bits), strict=True
            )
        ],
    )
    source = (
        f"{_sampled(config):,} tokens sampled from the draft at temperature "
        f"{config.sample.temperature}"
        if config.ngram.corpus == "sample"
        else "the training text"
    )
    sizes = " / ".join(f"{size:,}" for size in ngram_sizes)
    return "\n".join(
        [
            f"# {config.name}",
            "",
            "An oracle, a draft that learnt from it, and a Katz trigram, over one tokenizer. Made "
            "by `scripts/train.py` of ssd_jax; this file was written by its `report` step.",
            "",
            shape,
            "",
            f"Measured on {quality.tokens:,} tokens of held-out modules, in windows of "
            f"{window(config)} tokens, with the weights as shipped (bfloat16).",
            "",
            f"- Draft and oracle find the same token likeliest at {quality.agreement:.1%} of "
            f"positions; their distributions overlap by {quality.overlap:.1%}.",
            f"- Trigram: counted on {source}; {sizes} distinct uni-/bi-/trigrams; perplexity "
            f"{perplexity:.1f} a token on all held-out text.",
            f"- Tokenizer: byte-level BPE, {config.tokenizer.vocab_size:,} tokens, "
            f"{data['heldout']['bytes_per_token']:.2f} bytes a token on held-out text.",
            f"- Training: {_training(config, logs)}.",
            "",
            "## Data",
            "",
            _data(data),
            "",
            "## Rebuild",
            "",
            f"    python scripts/train.py all --config configs/{config.name}.toml",
            "",
            "The packages are those of the environment it runs in: other versions give other, "
            "similar models.",
            "",
        ]
    )


def _sampled(config: Config) -> int:
    return config.sample.shards * config.sample.batch * config.sample.length


def _training(config: Config, logs: dict[str, list[dict]]) -> str:
    weight = config.train_draft.data_weight
    losses = {
        "oracle": "cross-entropy",
        "draft": f"{weight:g} x cross-entropy + {1 - weight:g} x KL from the oracle",
    }
    return "; ".join(
        f"{name} {log[-1]['step']:,} steps, {sum(int(row['tokens']) for row in log):,} tokens, "
        f"{losses[name]}"
        for name, log in logs.items()
    )


def _data(data: dict) -> str:
    train, heldout = data["train"], data["heldout"]
    skipped = ", ".join(f"{count} {reason}" for reason, count in data["skipped"].items())
    rows = [
        (
            name,
            row["version"],
            row["licence"],
            f"{row['train_bytes'] / 1e6:.2f}",
            row["repeats"],
            f"{row['heldout_bytes'] / 1e6:.2f}",
        )
        for name, row in sorted(data["sources"].items())
    ]
    check = (
        "Files that contain a prompt of the benchmark were dropped."
        if data["benchmark_checked"]
        else "The benchmark's prompts were not at hand: the text was not checked for them."
    )
    return "\n".join(
        [
            f"{train['tokens']:,} tokens ({train['bytes'] / 1e6:.1f} MB) to train on, "
            f"{heldout['tokens']:,} ({heldout['bytes'] / 1e6:.1f} MB) held out by whole modules: "
            "the source of the standard library and of permissively licensed packages, without "
            f"their tests. Skipped files: {skipped}. {check}",
            "",
            _table(("source", "version", "licence", "MB", "times", "held-out MB"), rows),
        ]
    )


def _table(header: tuple, rows: Iterable[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
