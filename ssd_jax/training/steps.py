"""The steps of the pipeline. Each reads and writes the work folder, and can be run alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ssd_jax import checkpoint, files
from ssd_jax.errors import ConfigError, VocabularyMismatchError
from ssd_jax.gpt2 import GPT2
from ssd_jax.ngram import KatzModel
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import corpus, experiments, loop, progress, report, sample, tokens
from ssd_jax.training.config import (
    MAX_VOCAB,
    Config,
    DataConfig,
    SampleConfig,
    TokenizerConfig,
)
from ssd_jax.training.surgery import in_float32, layers_of

TRAINING = "training.json"  # the runs a model came from, beside its weights
SHARD_BYTES = 15 * 10**6  # the shipped files stay below what a Git host takes without LFS


def _text_settings(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, dict]:
    return {"data": dataclasses.asdict(data), "tokenizer": dataclasses.asdict(tokenizer)}


def _drawn_by(settings: SampleConfig) -> dict[str, Any]:
    """The settings that a shard depends on; there may be more or fewer of the same."""
    fields = dataclasses.asdict(settings)
    del fields["shards"]
    return fields


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
        settings = _text_settings(self.config.data, self.config.tokenizer)
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
            texts, repeats = zip(*((d.text, d.repeats) for d in documents), strict=True)
            count = tokens.write_split(self.work, split, texts, tokenizer, repeats)
            size = sum(document.size for document in documents)
            per_token = size / (count - len(documents))  # without the separators
            card[split] = {"tokens": count, "bytes": size, "bytes_per_token": per_token}
            self.say(
                f"{split}: {len(documents)} documents, {count} tokens, {per_token:.3f} B/token"
            )
        card["functions"] = {
            "files": len(text.functions), "bytes": sum(f.size for f in text.functions)
        }  # fmt: skip
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
        stored = self._card().get("settings", {})
        # Settings that did not exist when the text was encoded had their defaults.
        defaults = json.loads(json.dumps(_text_settings(DataConfig(), TokenizerConfig())))
        if {name: defaults[name] | stored.get(name, {}) for name in defaults} == settings:
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
        if self.config.train_oracle.generated:
            model = checkpoint.load_model(self.config.oracle.init)
            self._draw("own", self.config.own, model, step=0)
        self._train(self._trainer("oracle"), "oracle", stop_at)

    def draft(self, *, stop_at: int | None = None) -> None:
        """Train the draft, or resume its training, on the data and the oracle's distribution."""
        self._train_draft("draft", stop_at)

    def draft2(self, *, stop_at: int | None = None) -> None:
        """The same for the second draft; does nothing where the config has none."""
        if self.config.draft2 is not None:
            self._train_draft("draft2", stop_at)

    def _train_draft(self, name: str, stop_at: int | None) -> None:
        learns = self.config.training(name).data_weight < 1
        teacher = self._trained("oracle") if learns else None
        self._train(self._trainer(name, teacher), name, stop_at)

    def _train(self, trainer: loop.Trainer, name: str, stop_at: int | None) -> None:
        loop.train(
            trainer,
            self.work,
            self.work / name,
            generated=self._generated(name) if trainer.settings.generated else None,
            start=lambda: self._start(name),
            stop_at=stop_at,
            say=lambda line: self.say(f"{name}: {line}"),
        )

    def _generated(self, name: str) -> tokens.Generated:
        source = "own" if name == "oracle" else "generated"
        settings: SampleConfig = getattr(self.config, source)
        end_of_text = self._end_of_text()
        prompts, drawn = [], []
        for shard in sample.read_shards(self.work / source, settings):
            for prompt, given, row in zip(*shard, strict=True):
                ends = np.flatnonzero(row == end_of_text)
                prompts.append(prompt[:given])
                # What a model goes on with after an end is much the same everywhere.
                drawn.append(row[: ends[0] + 1] if len(ends) else row)
        length = self.config.training(name).context + 1
        if name == "oracle":
            return tokens.Generated.to_unlearn(prompts, drawn, length, end_of_text)
        return tokens.Generated.to_imitate(prompts, drawn, length)

    def _trainer(self, name: str, teacher: GPT2 | None = None) -> loop.Trainer:
        model = self.config.model(name)
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
        settings = self.config.training(name)
        return loop.Trainer(config, settings, teacher=teacher, seed=self.config.seed)

    def _start(self, name: str) -> GPT2 | None:
        """The model a new run starts from; keeps the record of how that one was trained."""
        model = self.config.model(name)
        if model.is_pretrained:
            record = Path(model.init) / TRAINING
            if record.is_file():
                tokens.save_json(self.work / name / TRAINING, files.read_json(record))
            return in_float32(checkpoint.load_model(model.init))
        if model.init == "oracle":
            return layers_of(self._trained("oracle"), model.n_layer)
        return None

    def _for_decoding(self, name: str) -> GPT2:
        """A trained model in float32: faster on a CPU where arithmetic is not the limit."""
        return in_float32(self._trained(name))

    def _trained(self, name: str) -> GPT2:
        trainer = self._trainer(name)
        return trainer.model(loop.restore(trainer, self.work / name))

    def _runs(self, name: str) -> list[dict]:
        """All runs that led to a model, this one last."""
        before = self.work / name / TRAINING
        log = progress.read_log(self.work / name / "log.jsonl")
        this = report.run_record(self.config, name, log)
        earlier = files.read_json(before)["runs"] if before.is_file() else []
        return [*earlier, this]

    def generated(self) -> None:
        """Draw text from the oracle, if drafts learn from it or the n-gram counts it."""
        learnt = any(self.config.training(name).generated for name in self.config.models[1:])
        if learnt or "generated" in self.config.ngram.corpus:
            self._draw_trained("generated", self.config.generated)

    def sample(self) -> None:
        """Draw the n-gram's corpus, if that is what is counted."""
        if "sample" in self.config.ngram.corpus:
            self._draw_trained("sample", self.config.sample)

    def _draw_trained(self, name: str, settings: SampleConfig) -> None:
        step = loop.last_step(self.work / settings.model)
        self._draw(name, settings, self._for_decoding(settings.model), step)

    def _draw(self, name: str, settings: SampleConfig, model: GPT2, step: int) -> None:
        """Draw shards into a folder of the work folder.

        Those drawn with other settings, or from an earlier state of the model, are replaced.
        """
        folder = self.work / name
        origin = _drawn_by(settings) | {"seed": self.config.seed, "model_step": step}
        note = folder / "origin.json"
        if folder.exists():
            stored = files.read_json(note) if note.exists() else {}
            # Settings that did not exist when it was drawn had their defaults.
            if _drawn_by(SampleConfig()) | stored != origin:
                shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        tokens.save_json(note, origin)
        sample.draw_shards(
            model,
            settings,
            folder,
            sample.Prompts(
                settings,
                tokens.TokenFile(self.work, "train"),
                Tokenizer.load(self.work),
                self.config.seed,
            ),
            seed=self.config.seed,
            say=lambda line: self.say(f"{name}: {line}"),
        )

    def _end_of_text(self) -> int:
        return cast(int, Tokenizer.load(self.work).eos_token_id)

    def ngram(self) -> None:
        """Fit the Katz trigram and write ``ngram.safetensors``."""
        model = KatzModel.fit(
            self._ngram_documents(), Tokenizer.load(self.work).vocab_size, **self._ngram_limits()
        )
        model.save(self.work / "ngram.safetensors")
        size = (self.work / "ngram.safetensors").stat().st_size
        self.say(f"{' / '.join(f'{n:,}' for n in model.sizes)} n-grams, {size / 1e6:.1f} MB")

    def _ngram_limits(self) -> dict[str, Any]:
        settings = self.config.ngram
        return {
            "min_trigram_count": settings.min_trigram_count,
            "max_bigrams": settings.max_bigrams or None,
            "max_trigrams": settings.max_trigrams or None,
            "memory_bytes": settings.memory_megabytes * 10**6,
            "scratch": self.work,
        }

    def _ngram_documents(self) -> Iterator[np.ndarray]:
        for name in self.config.ngram.corpus:
            if name == "train":
                yield from tokens.TokenFile(self.work, name).texts()
            else:
                settings: SampleConfig = getattr(self.config, name)
                for _ in range(self.config.ngram.drawn_repeats):
                    yield from sample.sampled_documents(
                        self.work / name, settings, self._end_of_text()
                    )

    def corpora(self, temperatures: Sequence[float], shards: int) -> None:
        """Print a comparison of texts to count the trigram on (:func:`experiments.corpora`)."""
        steps = "-".join(str(loop.last_step(self.work / name)) for name in ("oracle", "draft"))
        rows = experiments.corpora(
            self._for_decoding("oracle"),
            self._for_decoding("draft"),
            self.work,
            self.work / "corpora" / steps,  # of these states of the models
            temperatures=temperatures,
            shards=shards,
            seed=self.config.seed,
            tokenizer=Tokenizer.load(self.work),
            limits=self._ngram_limits(),
            say=self.say,
        )
        self.say(experiments.markdown(rows))

    def shapes(self, shapes: Sequence[str]) -> None:
        """Print a comparison of draft shapes, trained by ``[train_draft]``."""
        settings, drawing = self.config.train_draft, self.config.generated
        positions = max(settings.longest, drawing.prompt + drawing.length)
        self.generated()
        rows = experiments.shapes(
            self._trained("oracle"),
            {shape: experiments.parse_shape(shape, positions) for shape in shapes},
            settings,
            self.work,
            self.work / "shapes" / str(loop.last_step(self.work / "oracle")),
            generated=self._generated("draft") if settings.generated else None,
            drawing=drawing,
            tokenizer=Tokenizer.load(self.work),
            sizes=tokens.token_bytes(self.work / "tokenizer.json"),
            seed=self.config.seed,
            say=self.say,
        )
        self.say(experiments.markdown(rows))

    def report(self) -> None:
        """Assemble the trio in ``out``, measure what was assembled, and write its model card."""
        names = self.config.models
        ngram = KatzModel.load(self.work / "ngram.safetensors")
        trained = {name: self._trained(name) for name in names}
        tokenizer = Tokenizer.load(self.work)
        runs = {name: self._runs(name) for name in names}
        for name, model in trained.items():
            checkpoint.save_model(
                model, self.out / name, dtype="bfloat16", max_shard_bytes=SHARD_BYTES
            )
            tokenizer.save(self.out / name)
            tokens.save_json(self.out / name / TRAINING, {"runs": runs[name]})
        ngram.save(self.out / "ngram.safetensors")
        shipped = {name: checkpoint.load_model(self.out / name) for name in names}
        heldout = tokens.TokenFile(self.work, "heldout")
        quality = report.compare(
            shipped,
            heldout,
            tokens.token_bytes(self.work / "tokenizer.json"),
            context=report.window(shipped),
        )
        perplexity = ngram.perplexity(heldout.texts())
        card = report.model_card(
            self.config, self._card(), shipped, runs, quality, perplexity, ngram.sizes
        )
        with files.atomic_path(self.out / "README.md") as path:
            path.write_text(card, encoding="utf-8")
        for name, measured in quality.items():
            self.say(
                f"{name}: {measured.bits:.3f} bits per byte, agreement {measured.agreement:.1%}, "
                f"overlap {measured.overlap:.1%}"
            )
        self.say(f"trigram perplexity {perplexity:.1f}")
        for path in self.out.rglob("*"):
            if path.is_file() and path.stat().st_size > SHARD_BYTES:
                self.say(f"warning: {path} is {path.stat().st_size / 1e6:.1f} MB; "
                         "raise ngram.min_trigram_count or sample less")  # fmt: skip
