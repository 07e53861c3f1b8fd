"""The steps of the pipeline. Each reads and writes the work folder, and can be run alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from flax import nnx

from ssd_jax import checkpoint, files
from ssd_jax.errors import ConfigError, VocabularyMismatchError
from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.ngram import KatzModel
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import corpus, loop, report, sample, tokens
from ssd_jax.training.config import MAX_VOCAB, Config, ModelConfig
from ssd_jax.training.surgery import layers_of

SHARD_BYTES = 15 * 10**6  # the shipped files stay below what a Git host takes without LFS


class Pipeline:
    """The steps over one work folder.

    Args:
      config: the run.
      work: the work folder; every step finds here what the earlier ones left.
      out: where :meth:`report` assembles the trio.
      say: receives progress, one line at a time.
    """

    def __init__(self, config: Config, work: Path, out: Path, say: Callable[[str], None] = print):
        self.config, self.work, self.out, self.say = config, work, out, say

    def tokenizer(self) -> None:
        """Gather the text, train the tokenizer, encode both splits, write ``data.json``.

        Raises:
          ConfigError: the work folder holds models trained on other text.
          DataError: there is too little usable text.
        """
        settings = {
            "data": dataclasses.asdict(self.config.data),
            "tokenizer": dataclasses.asdict(self.config.tokenizer),
        }
        if self._encoded(json.loads(json.dumps(settings))):
            self.say("text already encoded")
            return
        self.work.mkdir(parents=True, exist_ok=True)
        text = corpus.gather(self.config.data)
        tokenizer = self._tokenizer(text)
        tokenizer.save(self.work)
        card = {"settings": settings} | corpus.card(text, self.config.data)
        for split, documents in (
            ("train", text.train + text.functions),
            ("heldout", text.heldout),
        ):
            count = tokens.write_split(self.work, split, documents, tokenizer)
            size = sum(document.size for document in documents)
            per_token = size / (count - len(documents))  # without the separators
            card[split] = {"tokens": count, "bytes": size, "bytes_per_token": per_token}
            self.say(f"{split}: {len(documents)} files, {count} tokens, {per_token:.3f} B/token")
        # Written last: its presence says that the step is complete.
        tokens.save_json(self.work / "data.json", card)

    def _tokenizer(self, text: corpus.Corpus) -> Tokenizer:
        settings = self.config.tokenizer
        if not settings.init:
            chosen = corpus.sample(text.train, settings.sample_megabytes)
            return tokens.train_tokenizer(chosen, settings)
        tokenizer = Tokenizer.load(settings.init)
        if tokenizer.eos_token_id is None or tokenizer.vocab_size > MAX_VOCAB:
            raise ConfigError(
                f"the tokenizer of {settings.init} has no end-of-text token, or more than "
                f"{MAX_VOCAB} tokens; take another"
            )
        return tokenizer

    def _encoded(self, settings: dict) -> bool:
        """Whether the work folder holds this text; refuses to mix two texts in one run."""
        if not (self.work / "data.json").exists():
            return False
        if self._card().get("settings") == settings:
            return True
        if (self.work / "oracle").exists():
            raise ConfigError(
                f"{self.work} holds a run with other data or tokenizer settings; "
                "choose another --workdir or remove it"
            )
        return False

    def _card(self) -> dict:
        return files.read_json(self.work / "data.json")

    def oracle(self, *, stop_at: int | None = None) -> None:
        """Train the oracle, or resume its training, on cross-entropy.

        ``stop_at`` leaves after that step, as if killed (for tests).
        """
        self._train(self._trainer("oracle"), "oracle", stop_at)

    def draft(self, *, stop_at: int | None = None) -> None:
        """Train the draft, or resume its training, on the data and the oracle's distribution."""
        teacher = None
        if self.config.train_draft.data_weight < 1:
            teacher = self._trained("oracle")
        self._train(self._trainer("draft", teacher), "draft", stop_at)

    def _train(self, trainer: loop.Trainer, name: str, stop_at: int | None) -> None:
        settings = trainer.settings
        self.say(
            f"{name}: {parameter_count(trainer.model(trainer.abstract())):,} parameters, "
            f"{settings.steps} steps of {settings.batch * settings.context} tokens"
        )
        loop.train(
            trainer,
            self.work,
            self.work / name,
            start=lambda: self._start(name),
            stop_at=stop_at,
            say=self.say,
        )

    def _trainer(self, name: str, teacher: GPT2 | None = None) -> loop.Trainer:
        model: ModelConfig = getattr(self.config, name)
        tokenizer = Tokenizer.load(self.work)
        if model.is_pretrained:
            config = dataclasses.replace(
                checkpoint.load_config(model.init), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
            )
            if config.vocab_size != tokenizer.vocab_size:
                raise VocabularyMismatchError(
                    f"{model.init} has {config.vocab_size} tokens, the tokenizer "
                    f"{tokenizer.vocab_size}; set tokenizer.init to the model's own"
                )
        else:
            config = model.gpt2(tokenizer.vocab_size, cast(int, tokenizer.eos_token_id))
        settings = getattr(self.config, f"train_{name}")
        return loop.Trainer(config, settings, teacher=teacher, seed=self.config.seed)

    def _start(self, name: str) -> GPT2 | None:
        """The model a new run starts from."""
        model: ModelConfig = getattr(self.config, name)
        if model.is_pretrained:
            return checkpoint.load_model(model.init)
        if model.init == "oracle":
            return layers_of(self._trained("oracle"), model.n_layer)
        return None

    def _trained(self, name: str) -> GPT2:
        trainer = self._trainer(name)
        return trainer.model(loop.restore(trainer, self.work / name))

    def sample(self) -> None:
        """Draw the n-gram's corpus from the draft.

        Shards drawn with other settings, or from an earlier state of the draft, are replaced.
        """
        trainer = self._trainer("draft")
        state = loop.restore(trainer, self.work / "draft")
        folder = self.work / "sample"
        origin = dataclasses.asdict(self.config.sample) | {
            "seed": self.config.seed, "draft_step": int(state.step)
        }  # fmt: skip
        del origin["shards"]  # more or fewer of the same
        note = folder / "origin.json"
        if folder.exists() and not (note.exists() and files.read_json(note) == origin):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        tokens.save_json(note, origin)
        # Sampling is bound by memory and latency, not arithmetic: float32 is faster on a CPU.
        model = GPT2(trainer.config, rngs=nnx.Rngs(0))
        nnx.update(model, state.params)
        sample.draw_shards(
            model,
            self.config.sample,
            folder,
            seed=self.config.seed,
            end_of_text=self._end_of_text(),
            say=self.say,
        )

    def _end_of_text(self) -> int:
        return cast(int, Tokenizer.load(self.work).eos_token_id)

    def ngram(self) -> None:
        """Fit the Katz trigram and write ``ngram.safetensors``."""
        settings = self.config.ngram
        model = KatzModel.fit(
            self._ngram_documents(),
            Tokenizer.load(self.work).vocab_size,
            min_trigram_count=settings.min_trigram_count,
        )
        model.save(self.work / "ngram.safetensors")
        size = (self.work / "ngram.safetensors").stat().st_size
        self.say(f"{' / '.join(f'{n:,}' for n in model.sizes)} n-grams, {size / 1e6:.1f} MB")

    def _ngram_documents(self) -> Iterator[np.ndarray]:
        if self.config.ngram.corpus == "train":
            return tokens.TokenFile(self.work, "train").texts()
        return sample.sampled_documents(
            self.work / "sample", self.config.sample.shards, self._end_of_text()
        )

    def report(self) -> None:
        """Assemble the trio in ``out``, measure what was assembled, and write its model card."""
        names = ("oracle", "draft")
        ngram = KatzModel.load(self.work / "ngram.safetensors")
        trained = {name: self._trained(name) for name in names}
        tokenizer = Tokenizer.load(self.work)
        for name, model in trained.items():
            checkpoint.save_model(
                model, self.out / name, dtype="bfloat16", max_shard_bytes=SHARD_BYTES
            )
            tokenizer.save(self.out / name)
        ngram.save(self.out / "ngram.safetensors")
        shipped = {name: checkpoint.load_model(self.out / name) for name in names}
        heldout = tokens.TokenFile(self.work, "heldout")
        quality = report.compare(
            shipped["oracle"],
            shipped["draft"],
            heldout,
            tokens.token_bytes(self.work / "tokenizer.json"),
            context=report.window(self.config),
        )
        logs = {name: loop.read_log(self.work / name / "log.jsonl") for name in names}
        perplexity = ngram.perplexity(heldout.texts())
        card = report.model_card(
            self.config, self._card(), shipped, logs, quality, perplexity, ngram.sizes
        )
        with files.atomic_path(self.out / "README.md") as path:
            path.write_text(card, encoding="utf-8")
        self.say(f"{quality}; trigram perplexity {perplexity:.1f}")
        for path in self.out.rglob("*"):
            if path.is_file() and path.stat().st_size > SHARD_BYTES:
                self.say(f"warning: {path} is {path.stat().st_size / 1e6:.1f} MB; "
                         "raise ngram.min_trigram_count or sample less")  # fmt: skip
