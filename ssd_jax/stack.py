"""A stack: the oracle, its drafts, the n-gram and the tokenizer that belong together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ssd_jax import checkpoint, memory, shipped
from ssd_jax.errors import CheckpointError, ConfigError, VocabularyMismatchError
from ssd_jax.gpt2 import GPT2, decodes_turned
from ssd_jax.ngram import KatzModel, NGramTables
from ssd_jax.plan import MAX_TRIGRAM_BRANCH, Capacities, Plan
from ssd_jax.tokenizer import Tokenizer

PathLike = str | os.PathLike

_LOG = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree of arrays that was flattened once. JAX flattens what it is called with at every call,
    which takes a millisecond or two for NNX modules."""

    leaves: list[jax.Array]
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: Any) -> Flat:
        return cls(*jax.tree.flatten(tree))

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Everything ``generate`` needs. Models are taken as they are at the first text: for other
    weights make another stack.

    Attributes:
      oracle: decides every token.
      drafts: propose, largest first; may be empty.
      ngram: proposes for the last draft (or, without drafts, for the oracle); may be ``None``.
      tokenizer: ``None`` if prompts are token ids.

    Raises:
      VocabularyMismatchError: the parts do not share one vocabulary.
    """

    oracle: GPT2
    drafts: tuple[GPT2, ...] = ()
    ngram: KatzModel | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self):
        _check_vocabularies([self.oracle, *self.drafts], self.ngram, self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.oracle.config.vocab_size

    @property
    def models(self) -> dict[str, GPT2]:
        """The oracle and the drafts by stage name."""
        return dict(zip(self.stage_names, (self.oracle, *self.drafts), strict=False))

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names by stage index: ``oracle``, ``draft``, ``draft2`` ..., ``ngram``."""
        drafts = tuple(f"draft{i + 1}" if i else "draft" for i in range(len(self.drafts)))
        return ("oracle", *drafts, "ngram")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-text ids of the oracle's configuration (those inside the vocabulary)."""
        eos = self.oracle.config.eos_token_id
        ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return tuple(i for i in ids if 0 <= i < self.vocab_size)

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-text id, if there is one inside the vocabulary."""
        bos = self.oracle.config.bos_token_id
        return bos if bos is not None and 0 <= bos < self.vocab_size else None

    @functools.cached_property
    def tables(self) -> NGramTables | None:
        """The n-gram on the device."""
        return None if self.ngram is None else jax.device_put(self.ngram.tables(MAX_TRIGRAM_BRANCH))

    def flat(self, drafts: int, trigram: bool) -> Flat:
        """What the loop takes of the stack: the oracle with so many of the drafts, and the n-gram
        if it is wanted."""
        found = self._flat.get((drafts, trigram))
        if found is None:
            models = (self.oracle, *self.drafts[:drafts])
            found = Flat.of((models, self.tables if trigram else None))
            self._flat[drafts, trigram] = found
        return found

    @functools.cached_property
    def _flat(self) -> dict[tuple[int, bool], Flat]:
        return {}

    @functools.cached_property
    def digest(self) -> str:
        """Tells stacks apart: configurations, shapes and types of all weights, and the values of
        those that are quickly read (biases, norms, positions), which any training moves."""
        parts = hashlib.sha256()
        for model in (self.oracle, *self.drafts):
            parts.update(repr((model.config, model.numerics, model.exact)).encode())
            for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
                parts.update(repr((leaf.shape, str(leaf.dtype))).encode())
                if leaf.ndim == 1:
                    parts.update(np.asarray(leaf).tobytes())
            parts.update(np.asarray(model.wpe[...]).tobytes())
        parts.update(repr(None if self.ngram is None else self.ngram.sizes).encode())
        return parts.hexdigest()


def _check_vocabularies(
    models: Sequence[GPT2], ngram: KatzModel | None, tokenizer: Tokenizer | None
) -> None:
    """All stages have the oracle's vocabulary, and the tokenizer none that is larger."""
    vocab, *others = (model.config.vocab_size for model in models)
    sizes = {f"draft{i + 1}" if i else "draft": size for i, size in enumerate(others)}
    if ngram is not None:
        sizes["n-gram"] = ngram.vocab_size
    for name, size in sizes.items():
        if size != vocab:
            raise VocabularyMismatchError(
                f"the {name} has a vocabulary of {size} tokens but the oracle one of {vocab}; "
                "use stages trained with the same tokenizer"
            )
    if tokenizer is not None and tokenizer.vocab_size > vocab:
        raise VocabularyMismatchError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the oracle's vocabulary "
            f"only {vocab}; load the tokenizer the oracle was trained with"
        )


def load(
    path: PathLike | None = None,
    *,
    oracle: PathLike | GPT2 | None = None,
    drafts: Sequence[PathLike | GPT2] = (),
    ngram: PathLike | KatzModel | None = None,
    tokenizer: PathLike | Tokenizer | None = None,
    dtype: str | None = None,
    exact: bool = False,
) -> Stack:
    """Load a stack.

    Args:
      path: the name of a shipped trio (``python-small``), or a trio folder: ``oracle/``,
        ``draft/`` (``draft2/`` ...) as Hugging Face folders and ``ngram.safetensors``; drafts and
        n-gram may be absent.
      oracle: instead of ``path``, a Hugging Face folder, a hub name, or a model.
      drafts: the same for each draft, largest first.
      ngram: a file written by :meth:`~ssd_jax.ngram.katz.KatzModel.save`, or a model.
      tokenizer: a folder or hub name; by default the oracle's own, if it has one.
      dtype: ``float32`` (the default on a CPU), ``bfloat16`` (the default on a GPU),
        ``float16``, or ``int8`` for an oracle of 8-bit weights (:mod:`ssd_jax.int8`), which is
        another model than the original.
      exact: an oracle whose logits do not depend on a pass's other rows, to the bit, so that tree
        passes cannot decide a near tie otherwise than plain decoding does. It has roundings of its
        own, and is slower (``docs/reliability.md``).

    Raises:
      CheckpointError: a part is missing or damaged.
      ConfigError: arguments or a configuration make no sense.
      VocabularyMismatchError: the parts do not share one vocabulary.
      InsufficientMemoryError: the weights need more memory than is left.
    """
    if (path is None) == (oracle is None):
        raise ConfigError("give either a trio folder or oracle=..., not both")
    named = True
    if path is not None:
        if drafts or ngram is not None:
            raise ConfigError(
                "a trio folder brings its own drafts and n-gram; pass oracle= instead"
            )
        folder = shipped.locate(path)
        named = not shipped.contains(folder)
        oracle, drafts, ngram = _parts(folder)
    assert oracle is not None
    dtype = dtype or checkpoint.default_dtype()
    # Drafts are small: 8 bits would save little, and cost agreement.
    of_drafts = checkpoint.default_dtype() if dtype == "int8" else dtype
    sources = [(oracle, dtype, exact), *((draft, of_drafts, False) for draft in drafts)]
    if exact and isinstance(oracle, GPT2) and not oracle.exact:
        raise ConfigError("exact is for an oracle that is loaded here; give GPT2 itself exact=True")
    # All that can be found out without the weights comes before them: they take long to fetch.
    models = [
        m if isinstance(m, GPT2) else checkpoint.abstract_model(m, **_kinds(dtype, exact))
        for m, dtype, exact in sources
    ]
    _check_vocabularies(models, None, None)
    grams, words = _ngram(ngram), _tokenizer(tokenizer, oracle)
    _check_vocabularies(models, grams, words)
    _check_memory(models, [not isinstance(source, GPT2) for source, *_ in sources], named=named)
    with memory.reported("the stack", memory.REMEDY):
        return Stack(
            oracle=_model(*sources[0]),
            drafts=tuple(_model(*source) for source in sources[1:]),
            ngram=grams,
            tokenizer=words,
        )


def _parts(folder: Path) -> tuple[Path, list[Path], Path | None]:
    """The parts of a trio folder."""
    if not (folder / "oracle").is_dir():
        raise CheckpointError(
            f"{folder} is not a trio folder: it has no oracle/ inside; "
            "pass a folder made by scripts/train.py, or oracle= for a single model"
        )
    drafts = [folder / "draft", *(folder / f"draft{i}" for i in range(2, 10))]
    ngram = folder / "ngram.safetensors"
    return (
        folder / "oracle",
        [draft for draft in drafts if draft.is_dir()],
        ngram if ngram.is_file() else None,
    )


def _check_memory(models: Sequence[GPT2], unread: Sequence[bool], *, named: bool) -> None:
    """Whether the models that are ``unread`` yet will fit. Of models that the user ``named`` the
    estimate is shown, not only logged."""
    oracle, *drafts = models
    capacities = Capacities.of(
        Plan.for_mode("staged", len(drafts), True), oracle.config.n_positions
    )
    _LOG.info(
        "%s, about %s of memory for a text of the full context",
        oracle.numerics,
        memory.estimate(models, capacities),
        extra={"stays": named},
    )
    needed = sum(memory.weights(m) for m, new in zip(models, unread, strict=True) if new)
    memory.check(needed, f"the stack in {oracle.numerics}")


def _model(source: PathLike | GPT2, dtype: str, exact: bool) -> GPT2:
    if isinstance(source, GPT2):
        return source
    _LOG.info("loading %s", source)
    return checkpoint.load_model(source, **_kinds(dtype, exact))


def _kinds(dtype: str, exact: bool) -> dict[str, Any]:
    """How a model is loaded to decode here, as :func:`~ssd_jax.checkpoint.load_model` is told."""
    return {"dtype": dtype, "exact": exact, "turned": decodes_turned(dtype)}


def _ngram(source: PathLike | KatzModel | None) -> KatzModel | None:
    if source is None or isinstance(source, KatzModel):
        return source
    _LOG.info("loading %s", source)
    return KatzModel.load(source)


def _tokenizer(source, oracle) -> Tokenizer | None:
    if source is None:
        if isinstance(oracle, GPT2):
            return None
        folder = Path(oracle)
        named = ("tokenizer.json", "vocab.json")
        if folder.is_dir() and not any((folder / name).is_file() for name in named):
            return None
        source = oracle
    return source if isinstance(source, Tokenizer) else Tokenizer.load(source)
