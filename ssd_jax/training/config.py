"""Settings of a training run: a TOML file read into frozen, checked records."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2Config

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MAX_VOCAB = 1 << 16  # token files are uint16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What text is read, and how it is split.

    A record of ``jsonl`` or ``hub`` is one document; the fields named here hold its text and what
    is known of it. A record without a usable text is left out, and counted by reason.

    Attributes:
      folders: folders of text files; a relative one is looked for beside the working directory.
      suffixes: endings of the files read from ``folders``.
      stdlib: read the running Python's standard library.
      packages: installed packages to read; ``["*"]`` means every permissively licensed one.
      package_megabytes: at most this much text of one package (a deterministic subset of files).
      jsonl: ``.jsonl`` or ``.jsonl.gz`` files of one record a line.
      hub: Hugging Face datasets, ``owner/name[:config][@split]`` (the split is ``train`` unless
        given) or a local dataset folder in place of ``owner/name``. They are streamed, and
        nothing else here reads from the network.
      hub_megabytes: one dataset is read, from its start, until it gave this much text, used or not.
      text_field: the field of a record that is its text.
      group_field: if given, the field that names a record's module, such as its repository:
        records that share it are on the same side of the held-out split. Else each is on its own.
      licence_field: if given, the field that names a record's licence (a name or a list of them);
        only records under permissive ones are used.
      stdlib_repeats: how often a standard-library window occurs in one epoch.
      function_repeats: if positive, each function of moderate length with a docstring in a Python
        training file or record is also a document of its own, and occurs this often in one epoch.
        A model that completes functions learns from these where a function ends.
      heldout_one_in: one module in so many is held out, chosen by a stable hash.
      heldout_modules: standard-library modules that are held out in any case.
      benchmark: a ``.jsonl[.gz]`` with a ``prompt`` field; a file or record that contains one of
        its prompts is dropped. Where there is no such benchmark, the data card says so.

    Raises:
      ConfigError: a value is impossible.
    """

    folders: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".py",)
    stdlib: bool = False
    packages: tuple[str, ...] = ()
    package_megabytes: float = 6.0
    jsonl: tuple[str, ...] = ()
    hub: tuple[str, ...] = ()
    hub_megabytes: float = 200.0
    text_field: str = "text"
    group_field: str = ""
    licence_field: str = ""
    stdlib_repeats: int = 1
    function_repeats: int = 0
    heldout_one_in: int = 40
    heldout_modules: tuple[str, ...] = ()
    benchmark: str = ""

    def __post_init__(self):
        if not self.text_field:
            raise ConfigError("data.text_field is empty; name the field that holds the text")
        if self.hub_megabytes <= 0:
            raise ConfigError("data.hub_megabytes must be positive; empty data.hub to read none")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE.

    Attributes:
      vocab_size: its exact vocabulary.
      sample_megabytes: how much text its merges are learnt from.
      init: a folder (or hub model) whose tokenizer is taken as it is, for fine-tuning; the other
        settings then say nothing.
    """

    vocab_size: int = 8192
    sample_megabytes: float = 24.0
    init: str = ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; the vocabulary comes from the tokenizer.

    Attributes:
      init: where the first weights are from: "" for random ones; ``"oracle"``, for a draft as
        wide as the oracle, for the oracle's embeddings and ``n_layer`` evenly spaced layers of
        it; else a Hugging Face GPT-2 folder (or hub model) to fine-tune, which then gives the
        shape too.
      n_inner: hidden units of an MLP; 0 for four times ``n_embd``.
    """

    n_embd: int = 0
    n_layer: int = 0
    n_head: int = 0
    n_inner: int = 0
    n_positions: int = 1024
    init: str = ""

    @property
    def is_pretrained(self) -> bool:
        """Whether a model folder gives the shape and the first weights."""
        return self.init not in ("", "oracle")

    def gpt2(self, vocab_size: int, end_of_text: int) -> GPT2Config:
        """The full architecture. Dropout is off: a run sees each window about once."""
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_inner=self.n_inner or None,
            n_positions=self.n_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one model.

    Attributes:
      steps: optimiser steps in all; may be changed when resuming.
      batch: sequences a step.
      context: tokens a sequence; at most the model's ``n_positions``.
      long_context: tokens a sequence in the last ``long_steps`` steps, where ``batch`` shrinks
        to keep the tokens a step. Short sequences are cheaper, long ones needed only late.
      long_steps: how many; 0 for none.
      learning_rate: peak of the schedule (linear warm-up, then cosine).
      optimizer: ``"adamw"`` or ``"muon"``.
      adam_learning_rate: with Muon, the peak for all that is not a kernel.
      final_ratio: the schedule ends at this fraction of the peak.
      checkpoint_every: steps between saved states.
      data_weight: for a draft, the weight of cross-entropy to the data; the rest goes to the
        Kullback-Leibler divergence from the oracle. 1 trains without an oracle.
      coupling: for a draft, the part of that rest which goes to the probability of drawing another
        token than the oracle with the same noise (:func:`~ssd_jax.training.losses.same_draw`).
      generated: the share of sequences taken from text the oracle wrote (section ``generated``
        for a draft, ``own`` for the oracle itself) rather than from the data. A draft learns what
        the oracle's distribution is there; the oracle, which must have an ``init``, unlearns the
        loops it fell into.
      loops: the share of sequences that are made to repeat a piece of themselves, on which the
        model learns to leave loops (see :func:`~ssd_jax.training.losses.loop_loss`) rather than
        the text. Drafts learn on them what the oracle does there.
      accumulate: parts a batch is taken in, one after another, to save memory; the gradient is
        the mean over them.
      dtype: operand type of the matrix products; parameters and optimiser stay float32.
    """

    steps: int
    batch: int
    context: int
    learning_rate: float
    optimizer: str = "adamw"
    adam_learning_rate: float = 2e-3
    long_context: int = 0
    long_steps: int = 0
    warmup: int = 100
    final_ratio: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_batches: int = 8
    data_weight: float = 1.0
    coupling: float = 0.0
    generated: float = 0.0
    loops: float = 0.0
    accumulate: int = 1
    dtype: str = "bfloat16"

    def shape(self, step: int) -> tuple[int, int]:
        """Batch and context of a step."""
        if step < self.steps - self.long_steps:
            return self.batch, self.context
        return max(1, self.batch * self.context // self.long_context), self.long_context

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that may occur."""
        return max(self.context, self.long_context)

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Every batch and context that occurs."""
        return {self.shape(0), self.shape(self.steps - 1)}


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text drawn from a model: ``shards`` files of ``batch`` rows of ``length`` tokens.

    Attributes:
      model: ``"draft"``, as in the paper, or ``"oracle"``.
      temperature: 0 for the likeliest tokens, which need a ``prompt`` to differ from row to row.
      top_k: draw from so many of the likeliest tokens; 0 for the whole vocabulary.
      greedy: the share of the shards that are drawn at temperature 0 whatever ``temperature``.
      prompt: each row goes on from so many tokens of the training text; 0 to begin new texts.
      functions: go on from the signatures and docstrings of the training text's functions, those
        of at most ``prompt`` tokens, instead of from any place.
    """

    model: str = "draft"
    temperature: float = 1.5
    top_k: int = 0
    greedy: float = 0.0
    prompt: int = 0
    functions: bool = False
    shards: int = 100
    batch: int = 64
    length: int = 512

    def shard_temperature(self, shard: int) -> float:
        """The temperature one shard is drawn at; the greedy ones are spread evenly."""
        is_greedy = int((shard + 1) * self.greedy) > int(shard * self.greedy)
        return 0.0 if is_greedy else self.temperature


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """The Katz trigram.

    Attributes:
      corpus: what is counted, one or more of ``"sample"`` (what the section ``sample`` says; in
        the paper, the draft's samples), ``"generated"`` (what the drafts learn from) and
        ``"train"`` (the training text).
      drawn_repeats: how often text that was drawn is counted: it is little next to the training
        text, and nearer to what is looked up.
      min_trigram_count: a trigram counted fewer times is dropped; 1 keeps all.
      max_bigrams, max_trigrams: keep at most so many, the most frequent; 0 for all.
      memory_megabytes: for counting, however long the text.
    """

    corpus: tuple[str, ...] = ("sample",)
    drawn_repeats: int = 1
    min_trigram_count: int = 1
    max_bigrams: int = 0
    max_trigrams: int = 0
    memory_megabytes: int = 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    ``draft2`` and ``train_draft2`` describe a second, smaller draft, which drafts for the first;
    without them there is none. ``own`` and ``generated`` are text that the oracle wrote before
    and after its training, for ``train_oracle.generated`` and ``train_draft.generated``;
    ``sample`` is what the n-gram is counted on.

    Raises:
      ConfigError: a value is impossible, or the parts do not fit one another.
    """

    oracle: ModelConfig
    draft: ModelConfig
    train_oracle: TrainConfig
    train_draft: TrainConfig
    draft2: ModelConfig | None = None
    train_draft2: TrainConfig | None = None
    name: str = "trio"
    seed: int = 0
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    own: SampleConfig = SampleConfig(model="oracle", temperature=0.0, prompt=64, length=193)
    generated: SampleConfig = SampleConfig(model="oracle", temperature=0.7, prompt=64, length=193)
    sample: SampleConfig = SampleConfig()
    ngram: NgramConfig = NgramConfig()

    def __post_init__(self):
        if not 257 <= self.tokenizer.vocab_size <= MAX_VOCAB:
            raise ConfigError(
                f"tokenizer.vocab_size must lie in 257..{MAX_VOCAB} (256 bytes, {END_OF_TEXT} "
                f"and merges; stored as uint16), not {self.tokenizer.vocab_size}"
            )
        if (self.draft2 is None) != (self.train_draft2 is None):
            raise ConfigError("a second draft needs both sections, [draft2] and [train_draft2]")
        for name in self.models:
            model, train = self.model(name), self.training(name)
            _check_model(name, model)
            _check_train(f"train_{name}", train)
            if not model.is_pretrained:
                check_context(f"train_{name}", train, model.n_positions)
            if train.generated:
                self._check_generated(name, train)
            copies = model.init == "oracle" and not self.oracle.is_pretrained
            if copies and model.n_embd != self.oracle.n_embd:
                raise ConfigError(
                    f'{name}.init="oracle" copies layers, so {name}.n_embd must be the oracle\'s; '
                    "make them equal or start the draft from nothing"
                )
        ngram = self.ngram
        self._check_drawing("sample")
        if "generated" in ngram.corpus:
            self._check_drawing("generated")
        for field in ("drawn_repeats", "min_trigram_count", "memory_megabytes"):
            if getattr(ngram, field) < 1:
                raise ConfigError(f"ngram.{field} must be at least 1")
        if min(ngram.max_bigrams, ngram.max_trigrams) < 0:
            raise ConfigError("ngram.max_bigrams and max_trigrams must not be negative")
        if not ngram.corpus or not set(ngram.corpus) <= {"sample", "generated", "train"}:
            raise ConfigError(
                "ngram.corpus must list some of sample, generated and train, "
                f"not {list(ngram.corpus)}"
            )
        if self.data.heldout_one_in < 2:
            raise ConfigError("data.heldout_one_in must be at least 2, or nothing is left to train")

    def _check_generated(self, name: str, train: TrainConfig) -> None:
        if name == "oracle" and not self.oracle.is_pretrained:
            raise ConfigError(
                "train_oracle.generated is text of the model that oracle.init names; name one, "
                "or set it to 0"
            )
        source = "own" if name == "oracle" else "generated"
        self._check_drawing(source)
        drawing: SampleConfig = getattr(self, source)
        if drawing.model != "oracle":
            raise ConfigError(f"{source}.model must be oracle, not {drawing.model!r}")
        length = drawing.prompt + drawing.length
        if length <= train.context:
            raise ConfigError(
                f"train_{name}.generated needs rows of at least {train.context + 1} tokens, "
                f"and {source}.prompt + {source}.length is {length}; lengthen them"
            )

    def _check_drawing(self, name: str) -> None:
        settings: SampleConfig = getattr(self, name)
        if settings.model not in ("draft", "oracle"):
            raise ConfigError(f"{name}.model must be draft or oracle, not {settings.model!r}")
        if min(settings.shards, settings.batch, settings.length) < 1:
            raise ConfigError(f"{name}.shards, batch and length must be at least 1")
        for field in ("temperature", "top_k", "prompt"):
            if getattr(settings, field) < 0:
                raise ConfigError(f"{name}.{field} must not be negative")
        if not 0 <= settings.greedy <= 1:
            raise ConfigError(f"{name}.greedy must lie in [0, 1], not {settings.greedy}")
        if settings.functions and not settings.prompt:
            raise ConfigError(
                f"{name}.functions needs {name}.prompt, the longest signature and docstring in "
                "tokens; set it"
            )
        if 0 in (settings.temperature, 1 - settings.greedy) and not settings.prompt:
            raise ConfigError(
                f"{name}.temperature=0 without a prompt draws one text over and over; "
                f"set {name}.prompt or a temperature"
            )
        model, length = self.model(settings.model), settings.prompt + settings.length
        if not model.is_pretrained and length > model.n_positions:
            raise ConfigError(
                f"{name}: {length} tokens are longer than the {settings.model}'s "
                f"n_positions={model.n_positions}; shorten {name}.length"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, largest first."""
        return ("oracle", "draft", "draft2") if self.draft2 else ("oracle", "draft")

    def model(self, name: str) -> ModelConfig:
        """The section that gives a model's shape."""
        return getattr(self, name)

    def training(self, name: str) -> TrainConfig:
        """The section that says how a model is trained."""
        return getattr(self, f"train_{name}")


def _check_model(name: str, model: ModelConfig) -> None:
    if name == "oracle" and model.init == "oracle":
        raise ConfigError("oracle.init cannot be the oracle itself; name a model folder")
    shape = (model.n_embd, model.n_layer, model.n_head, model.n_inner)
    if not model.is_pretrained:
        model.gpt2(MAX_VOCAB, END_OF_TEXT_ID)
    elif any(shape):
        raise ConfigError(
            f"{name}.init={model.init!r} gives the shape; remove n_embd, n_layer, n_head, n_inner"
        )


def check_context(name: str, train: TrainConfig, positions: int) -> None:
    """Refuse sequences longer than a model's positions.

    Raises:
      ConfigError: they are.
    """
    if train.longest > positions:
        raise ConfigError(
            f"{name}: a context of {train.longest} is longer than n_positions={positions}; "
            "shorten it or give the model more positions"
        )


def _check_train(name: str, train: TrainConfig) -> None:
    for field in (
        "steps", "batch", "context", "accumulate", "checkpoint_every", "log_every",
        "evaluate_every", "evaluate_batches",
    ):  # fmt: skip
        if getattr(train, field) < 1:
            raise ConfigError(f"{name}.{field} must be at least 1, not {getattr(train, field)}")
    if train.long_steps and train.long_context < train.context:
        raise ConfigError(f"{name}.long_context must be at least context={train.context}")
    for batch, context in sorted(train.shapes):
        if batch % train.accumulate:
            raise ConfigError(
                f"{name}.accumulate={train.accumulate} does not divide the batch of {batch} "
                f"sequences of {context} tokens; choose a divisor"
            )
    if min(train.learning_rate, train.adam_learning_rate) <= 0:
        raise ConfigError(f"{name}: learning rates must be positive")
    for field in ("data_weight", "coupling", "generated", "loops"):
        if not 0 <= getattr(train, field) <= 1:
            raise ConfigError(f"{name}.{field} must lie in [0, 1], not {getattr(train, field)}")
    if train.optimizer not in ("adamw", "muon"):
        raise ConfigError(f"{name}.optimizer must be adamw or muon, not {train.optimizer!r}")
    if train.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"{name}.dtype must be float32 or bfloat16, not {train.dtype!r}")


def load(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML syntax).

    Raises:
      ConfigError: the file is missing or not TOML, a key is unknown, or a value has the wrong
        type or is impossible.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _override(table, override)
    return _record(Config, table, "")


def _override(table: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"an override reads section.key=value, not {text!r}")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {text!r}: {section} is not a section")
    try:
        table[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = value  # a bare word is a string


def _record(kind: type, table: dict, prefix: str) -> Any:
    """Build the dataclass ``kind`` from a TOML table, refusing unknown keys and wrong types."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting {prefix}{unknown[0]}; known: {', '.join(hints)}")
    values = {name: _value(hints[name], v, prefix + name) for name, v in table.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ConfigError(f"the setting {prefix}{missing[0]} is missing; add it to the config")
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):  # an optional section
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a section: write [{name}] and its settings")
        return _record(typing.cast(type, hint), value, name + ".")
    if hint == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{name} must be a list of strings, not {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value
