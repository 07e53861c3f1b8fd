"""Token files: the tokenizer, the encoded splits, and training batches read from them.

A split is two NumPy files in the work folder: ``<split>.tokens.npy``, uint16 ``[tokens]``, every
document closed by ``<|endoftext|>``; and ``<split>.documents.npy``, int64 ``[documents, 2]``,
each document's first token and how often its text occurs in one epoch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from ssd_jax.errors import DataError
from ssd_jax.files import atomic_path
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training.config import END_OF_TEXT, TokenizerConfig, TrainConfig

# What a merge never crosses. Unlike in GPT-2's pattern, a newline keeps all of the following
# line's indentation (one token for most line starts), and underscores and one leading mark
# belong to the name (``.append``, ``__init__``).
_PIECES = (
    r"\n+[ \t]*|[^\s\p{L}\p{N}_]?[\p{L}_]+| [\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+"
    r"|\s+(?!\S)|\s+"
)
IGNORED = -1  # in Batch.loops
NEWLINE_CUTS = 0.1  # share of the newlines after which a document's encoding is cut


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Byte-level BPE with ``<|endoftext|>`` as token 0; every text round-trips exactly.

    Raises:
      DataError: the text is too small for that many merges.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != config.vocab_size:
        raise DataError(
            f"the text yields only {backend.get_vocab_size()} tokens; "
            f"lower tokenizer.vocab_size={config.vocab_size} or add text"
        )
    return Tokenizer(backend)


def token_bytes(file: Path) -> np.ndarray:
    """``[V]`` int64, UTF-8 bytes each token of a ``tokenizer.json`` stands for.

    Special tokens such as ``<|endoftext|>`` stand for none.
    """
    fields = json.loads(file.read_text(encoding="utf-8"))
    # The byte-level alphabet spells each byte as one character.
    sizes = {index: len(token) for token, index in fields["model"]["vocab"].items()}
    for token in fields["added_tokens"]:
        sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    found = np.zeros(1 + max(sizes), np.int64)
    found[list(sizes)] = list(sizes.values())
    return found


def encode_document(text: str, tokenizer: Tokenizer, random: np.random.Generator) -> list[int]:
    """Token ids of one document, its closing ``<|endoftext|>`` included.

    The tokenizer joins a newline with the indentation after it, but a prompt often ends in the
    newline alone. So that a model can go on from there, the text is cut after some newlines as
    a prompt would be, and it does not end in one: a bare newline says nothing of the end.
    """
    lines = text.rstrip("\n").splitlines(keepends=True)
    cuts = np.flatnonzero(random.random(len(lines)) < NEWLINE_CUTS)
    ids: list[int] = []
    for first, last in itertools.pairwise([0, *cuts, len(lines)]):
        ids += tokenizer.encode("".join(lines[first:last]))
    return [*ids, cast(int, tokenizer.eos_token_id)]


def write_split(
    folder: Path,
    split: str,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    repeats: Sequence[int] | None = None,
) -> int:
    """Encode one split; returns its number of tokens, separators included.

    ``repeats`` are the occurrences of each text in one epoch, by default one.
    """
    random = np.random.default_rng(0)
    encoded = [np.array(encode_document(text, tokenizer, random), np.uint16) for text in texts]
    starts = np.cumsum([0] + [len(ids) for ids in encoded])[:-1]
    repeats = [1] * len(texts) if repeats is None else repeats
    tokens = np.concatenate(encoded)
    save_array(folder / f"{split}.documents.npy", np.stack([starts, repeats], axis=1))
    save_array(folder / f"{split}.tokens.npy", tokens)
    return len(tokens)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write ``.npy`` so that ``path`` never holds half a file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_json(path: Path, value: Any) -> None:
    """Write JSON so that ``path`` never holds half of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class TokenFile:
    """One encoded split, memory-mapped.

    Raises:
      DataError: the files are missing or damaged.
    """

    def __init__(self, folder: Path, split: str):
        try:
            self.tokens = np.load(folder / f"{split}.tokens.npy", mmap_mode="r")
            self.documents = np.load(folder / f"{split}.documents.npy")
        except (OSError, ValueError) as error:
            raise DataError(
                f"no encoded {split} text in {folder} ({error}); run the tokenizer step first"
            ) from error

    def windows(self, context: int) -> np.ndarray:
        """First tokens, int64, of back-to-back windows of ``context + 1`` tokens.

        A window of a document that repeats in an epoch occurs as often.

        Raises:
          DataError: the split is shorter than one window.
        """
        starts = np.arange(0, len(self.tokens) - context, context)
        if not len(starts):
            raise DataError(
                f"{len(self.tokens)} tokens do not fill one window of context={context}; "
                "add text or shorten the context"
            )
        document = np.searchsorted(self.documents[:, 0], starts, side="right") - 1
        return np.repeat(starts, self.documents[document, 1])

    def spread(self, context: int, windows: int) -> np.ndarray:
        """First tokens of at most so many distinct windows, spread evenly over the text.

        Raises:
          DataError: the split is shorter than one window.
        """
        starts = np.unique(self.windows(context))
        return starts[:: -(-len(starts) // windows)]

    def read(self, starts: np.ndarray, context: int) -> np.ndarray:
        """``[B, context + 1]`` int32 tokens from ``starts`` ``[B]`` on."""
        rows = [self.tokens[start : start + context + 1] for start in starts]
        return np.stack(rows).astype(np.int32)

    def texts(self) -> Iterator[np.ndarray]:
        """The documents one by one, uint16, each with its closing ``<|endoftext|>``."""
        yield from np.split(self.tokens, self.documents[1:, 0])


class Batch(NamedTuple):
    """Sequences of one optimiser step, all int32.

    Attributes:
      tokens: ``[B, T + 1]``; each token but the first is predicted from those before it.
      positions: ``[B, T]`` position ids.
      loops: ``[B, T]``, for each predicted token: 0 if it is to be learnt, the distance back to
        the token it repeats if it belongs to a loop, :data:`IGNORED` if nothing is learnt of it.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loops: np.ndarray

    @classmethod
    def plain(cls, tokens: np.ndarray, positions: np.ndarray) -> Batch:
        """Sequences as they were written."""
        return cls(tokens, positions.astype(np.int32), np.zeros(positions.shape, np.int32))


class Generated(NamedTuple):
    """Text that a model drew, for training.

    Attributes:
      tokens: ``[rows, length]``.
      loops: ``[rows, length - 1]`` int32, as in :class:`Batch`.
    """

    tokens: np.ndarray
    loops: np.ndarray

    @classmethod
    def to_unlearn(
        cls,
        prompts: Sequence[np.ndarray],
        drawn: Sequence[np.ndarray],
        length: int,
        end_of_text: int,
    ) -> Generated:
        """Prompts and what was drawn after each, from which a model learns to leave its loops.

        A text without a loop that came to its end is learnt like any other: it shows what to do
        instead. Of the other texts nothing but the loops counts.
        """
        marks = []
        for prompt, text in zip(prompts, drawn, strict=True):
            whole = np.concatenate([prompt, text])
            loops = np.append(0, _find_loops(whole.tolist()))[len(prompt) :]
            is_good = not loops.any() and len(text) and text[-1] == end_of_text
            loops = np.where(loops > 0, loops, 0 if is_good else IGNORED)
            marks.append(np.append(np.zeros(len(prompt), np.int32), loops))
        return cls._joined(prompts, drawn, marks, length)

    @classmethod
    def to_imitate(
        cls, prompts: Sequence[np.ndarray], drawn: Sequence[np.ndarray], length: int
    ) -> Generated:
        """Prompts and what was drawn after each, learnt like any text."""
        marks = [np.zeros(len(p) + len(d), int) for p, d in zip(prompts, drawn, strict=True)]
        return cls._joined(prompts, drawn, marks, length)

    @classmethod
    def _joined(cls, prompts, drawn, marks, length: int) -> Generated:
        """Rows that begin with one text each; the texts after it fill the place that it leaves."""
        texts = [np.concatenate(pair) for pair in zip(prompts, drawn, strict=True)]
        for mark in marks:
            mark[0] = IGNORED  # what a text begins with does not follow from another
        tokens = np.stack([_filled(texts, row, length) for row in range(len(texts))])
        loops = np.stack([_filled(marks, row, length) for row in range(len(texts))])
        return cls(tokens, loops[:, 1:].astype(np.int32))


def _filled(pieces: Sequence[np.ndarray], first: int, length: int) -> np.ndarray:
    """``length`` items of the pieces one after another, beginning with the ``first``."""
    found: list[np.ndarray] = []
    while (size := sum(map(len, found))) < length:
        found.append(pieces[(first + len(found)) % len(pieces)][: length - size])
    return np.concatenate(found)


def _find_loops(tokens: list[int], length: int = 8) -> np.ndarray:
    """``[T]`` int32 for ``T + 1`` tokens: how far back the n-gram that ends in a token was last.

    0 unless it is the third occurrence at least: saying a thing twice is no loop.
    """
    seen: dict[tuple[int, ...], list[int]] = {}
    loops = np.zeros(len(tokens) - 1, np.int32)
    for end in range(length, len(tokens) + 1):
        before = seen.setdefault(tuple(tokens[end - length : end]), [])
        if len(before) >= 2:
            loops[end - 2] = end - before[-1]
        before.append(end)
    return loops


class Batches:
    """Training batches as a pure function of ``(seed, step)``.

    Windows are visited in a new random order every epoch, the whole grid shifted by a random
    amount below one window, so that a later epoch cuts the text elsewhere. ``settings.loops`` of
    the rows are turned into loops; ``generated``, where given and long enough for the context,
    takes the place of ``settings.generated`` of them.
    """

    def __init__(
        self,
        tokens: TokenFile,
        settings: TrainConfig,
        positions: int,
        seed: int,
        generated: Generated | None = None,
    ):
        self._tokens, self._settings, self._generated = tokens, settings, generated
        self._positions, self._seed = positions, seed
        self._starts: dict[int, np.ndarray] = {}
        self._epoch = (-1, -1)

    def __call__(self, step: int) -> Batch:
        """The sequences of one step.

        Half of the rows start at position 0, the others anywhere that fits: a context shorter
        than ``n_positions`` then still trains every position's embedding.
        """
        batch, context = self._settings.shape(step)
        starts = np.array([self._start(step * batch + row, context) for row in range(batch)])
        random = np.random.default_rng((self._seed, 1, step))
        offset = random.integers(0, self._positions - context + 1, batch)
        offset = np.where(random.random(batch) < 0.5, 0, offset)
        made = Batch.plain(self._tokens.read(starts, context), offset[:, None] + np.arange(context))
        if self._settings.loops:
            for row in np.flatnonzero(random.random(batch) < self._settings.loops):
                _make_loop(made.tokens[row], made.loops[row], random)
        if self._generated is not None and context < self._generated.tokens.shape[1]:
            chosen = random.random(batch) < self._settings.generated
            picked = random.integers(0, len(self._generated.tokens), batch)[chosen]
            made.tokens[chosen] = self._generated.tokens[picked, : context + 1]
            made.loops[chosen] = self._generated.loops[picked, :context]
            # Such text starts at position 0, as it did when it was drawn.
            made.positions[chosen] = np.arange(context)
        return made

    def _start(self, index: int, context: int) -> int:
        if context not in self._starts:
            self._starts[context] = self._tokens.windows(context)
        starts = self._starts[context]
        epoch, place = divmod(index, len(starts))
        if self._epoch != (context, epoch):
            random = np.random.default_rng((self._seed, 0, epoch))
            self._order = random.permutation(starts)
            self._shift = int(random.integers(context)) if epoch else 0
            self._epoch = (context, epoch)
        last = len(self._tokens.tokens) - context - 1
        return min(int(self._order[place]) + self._shift, last)


def _make_loop(tokens: np.ndarray, loops: np.ndarray, random: np.random.Generator) -> None:
    """Let ``[T + 1]`` tokens repeat a piece of themselves, from some place to the end.

    Everything from the third occurrence on is a loop and marked as one in ``loops`` ``[T]``:
    writing a thing twice is common in good text. Pieces of 1 token up to an eighth of the text
    are equally likely on a logarithmic scale.
    """
    start = int(random.integers(1, max(2, len(tokens) // 4)))
    period = int(np.exp(random.uniform(0, np.log(len(tokens) // 8 + 1))))
    tokens[start:] = np.resize(tokens[start : start + period], len(tokens) - start)
    loops[start + 2 * period - 1 :] = period
