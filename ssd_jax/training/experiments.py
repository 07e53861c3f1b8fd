"""Comparisons that a trio's settings are chosen by. Each returns the rows of a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.costs import pass_seconds
from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.ngram import KatzModel
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import loop, report, sample
from ssd_jax.training.config import ModelConfig, SampleConfig, TrainConfig
from ssd_jax.training.surgery import in_float32
from ssd_jax.training.tokens import Generated, TokenFile

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
    end_of_text = cast(int, tokenizer.eos_token_id)

    def drawn(name: str, model: GPT2, source: TokenFile, settings: SampleConfig):
        prompts = sample.Prompts(settings, source, tokenizer, seed)
        _draw(name, model, settings, prompts, work, seed, say)
        return list(sample.sampled_documents(work / name, settings, end_of_text))

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


def _draw(
    name: str,
    model: GPT2,
    settings: SampleConfig,
    prompts: sample.Prompts,
    work: Path,
    seed: int,
    say: Say,
) -> None:
    sample.draw_shards(
        model, settings, work / name, prompts, seed=seed, say=lambda line: say(f"{name}: {line}")
    )


def _some_of(documents: list[np.ndarray], tokens: int, seed: int) -> list[np.ndarray]:
    """Random whole documents of about so many tokens."""
    order = np.random.default_rng(seed).permutation(len(documents))
    sizes = np.cumsum([len(documents[i]) for i in order])
    return [documents[i] for i in order[: 1 + np.searchsorted(sizes, tokens)]]


# --- The draft's shape -------------------------------------------------------------------


def shapes(
    oracle: GPT2,
    candidates: Mapping[str, ModelConfig],
    settings: TrainConfig,
    text: Path,
    work: Path,
    *,
    generated: Generated | None,
    drawing: SampleConfig,
    tokenizer: Tokenizer,
    sizes: np.ndarray,
    seed: int,
    say: Say = print,
) -> list[Row]:
    """Drafts of several shapes, trained alike, by what they accept and what a pass costs.

    "Accepted" is the mean number of tokens of a chain of :data:`CHAIN` that the oracle would
    take of text that it wrote itself, going on from held-out text as ``drawing`` says: greedy,
    where the draft finds the same tokens likeliest; at temperature 1, from the overlap of the
    two distributions. "Speed" divides the tokens of a round by its cost in oracle passes, with
    passes timed alone on this device, one row each over a cache of 256.

    Args:
      oracle: what they learn from.
      candidates: the shapes, by name.
      settings: how each is trained.
      text: folder of the encoded splits.
      work: keeps what was drawn and trained, so that an interrupted comparison goes on.
      generated: text of the oracle's that they learn from, for ``settings.generated``.
      drawing: where and how far the oracle's own text goes on; 64 rows each are judged.
      tokenizer: the models'.
      sizes: ``[V]``, bytes of each token.
      seed: of initial weights, batches and draws.
      say: receives progress.
    """
    end_of_text = cast(int, tokenizer.eos_token_id)
    trained: dict[str, GPT2] = {"oracle": in_float32(oracle)}
    for name, shape in candidates.items():
        config = shape.gpt2(oracle.config.vocab_size, end_of_text)
        teacher = oracle if settings.data_weight < 1 else None
        trainer = loop.Trainer(config, settings, teacher=teacher, seed=seed)
        state = loop.train(
            trainer,
            text,
            work / name,
            generated=generated,
            say=lambda line, name=name: say(f"{name}: {line}"),
        )
        trained[name] = in_float32(trainer.model(state))
    heldout = TokenFile(text, "heldout")
    quality = report.compare(trained, heldout, sizes, context=settings.context, windows=128)
    few = dataclasses.replace(drawing, shards=1, batch=64)
    prompts = sample.Prompts(few, heldout, tokenizer, seed)
    judges: list[sample.Shard] = []
    for name, temperature in (("judge-greedy", 0.0), ("judge-sampled", 1.0)):
        own = dataclasses.replace(few, temperature=temperature, greedy=0.0)
        _draw(name, trained["oracle"], own, prompts, work, seed, say)
        judges += sample.read_shards(work / name, own)
    times = pass_seconds([(model, 1) for model in trained.values()])
    seconds = dict(zip(trained, times, strict=True))
    table = []
    for name in candidates:
        draft = trained[name]
        greedy, sampled = (
            accepted(trained["oracle"], draft, shard, end_of_text)[kind]
            for shard, kind in zip(judges, ("greedy", "sampled"), strict=True)
        )
        relative = seconds[name] / seconds["oracle"]
        table.append(
            {
                "layers x width": name,
                "parameters": f"{parameter_count(draft) / 1e6:.2f}M",
                "bits per byte": f"{quality[name].bits:.3f}",
                f"accepted of {CHAIN}, greedy": f"{greedy:.2f}",
                "T=1": f"{sampled:.2f}",
                "ms a pass": f"{1e3 * seconds[name]:.2f}",
                "of the oracle's": f"{relative:.2f}",
                "speed, greedy": f"{(1 + greedy) / (1 + CHAIN * relative):.2f}",
                "speed, T=1": f"{(1 + sampled) / (1 + CHAIN * relative):.2f}",
            }
        )
    return table


def parse_shape(text: str, positions: int, head_dim: int = 32) -> ModelConfig:
    """``2x96`` as a shape of 2 layers and 96 channels; ``4x96:312`` with 312 hidden units a layer.

    Raises:
      ConfigError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?::([1-9]\d*))?", text, re.ASCII)
    if not found:
        raise ConfigError(
            f"a shape reads LAYERSxWIDTH or LAYERSxWIDTH:HIDDEN, for instance 2x96, not {text!r}"
        )
    layers, width, hidden = (int(number or 0) for number in found.groups())
    heads = max(1, width // head_dim)
    return ModelConfig(width, layers, heads, n_inner=hidden, n_positions=positions)


def accepted(oracle: GPT2, draft: GPT2, shard: sample.Shard, end_of_text: int) -> dict[str, float]:
    """Mean accepted tokens of a chain of :data:`CHAIN`, begun at every token that was drawn.

    Args:
      oracle: what drew the text.
      draft: what would draft it.
      shard: the text; of each row what was drawn counts, up to its first end.
      end_of_text: id of the token.

    Returns:
      ``greedy``: a token is taken where both find the same one likeliest; ``sampled``: with the
      probability that their distributions have in common.
    """

    @jax.jit
    def measure(oracle, draft, tokens):
        log_p, log_q = (jax.nn.log_softmax(m(tokens)[0]) for m in (oracle, draft))
        same = (log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32)
        return {"greedy": same, "sampled": jnp.exp(jnp.minimum(log_p, log_q)).sum(-1)}

    chains: dict[str, list[np.ndarray]] = {"greedy": [], "sampled": []}
    length = shard.prompts.shape[1] + shard.drawn.shape[1]
    for prompt, given, drawn in zip(*shard, strict=True):
        row = np.zeros((1, length), np.int32)  # of one length, so that one program serves all
        row[0, :given], row[0, given : given + len(drawn)] = prompt[:given], drawn
        ends = np.flatnonzero(drawn == end_of_text)
        last = given + (ends[0] + 1 if len(ends) else len(drawn))
        for kind, rates in measure(oracle, draft, row).items():
            # The rate at a place is that of the token after it.
            chains[kind].append(chain_lengths(np.asarray(rates)[0, given - 1 : last - 1], CHAIN))
    return {kind: float(np.concatenate(own).mean()) for kind, own in chains.items()}


def chain_lengths(rates: np.ndarray, length: int) -> np.ndarray:
    """``[T]`` expected accepted tokens of chains of ``length`` begun at each of ``[T]`` tokens.

    ``rates`` are the probabilities that the token drafted at each place is accepted; chains end
    where the text does.
    """
    padded = np.append(rates, np.zeros(length - 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, length)
    return np.cumprod(windows, axis=-1).sum(axis=-1)
