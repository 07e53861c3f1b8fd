"""Text to token ids and back, over the ``tokenizers`` library."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ssd_jax import files
from ssd_jax.errors import CheckpointError, PromptError

_END_OF_TEXT = "<|endoftext|>"
_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


# Far above any vocabulary.
_MAX_ID = 2**24


class Tokenizer:
    """A byte-level BPE tokenizer with the end- and beginning-of-text tokens of its model.

    Args:
      backend: the tokenizer proper. Truncation and padding it may ask for are turned off.
      eos_token: the token that ends a text; ``<|endoftext|>`` by default, if there is one.
      bos_token: the token that begins a text; likewise.

    Attributes:
      eos_token_id: id of ``eos_token``, or ``None``.
      bos_token_id: id of ``bos_token``, or ``None``.
      vocab_size: one more than the largest token id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._serialized = backend.to_str()
        self._plain = tokenizers.Tokenizer.from_str(self._serialized)
        self._plain.encode_special_tokens = True  # the library's name for "as ordinary text"
        self.eos_token_id = backend.token_to_id(eos_token or _END_OF_TEXT)
        self.bos_token_id = backend.token_to_id(bos_token or _END_OF_TEXT)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def load(cls, path_or_name: str | os.PathLike) -> Tokenizer:
        """The tokenizer of a folder (or hub model): ``tokenizer.json``, else GPT-2's two files.

        Raises:
          CheckpointError: the folder holds no tokenizer, or a damaged one.
        """
        folder = files.locate(path_or_name, _FILES)
        whole, vocab, merges = (folder / name for name in _FILES[:3])
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            raise CheckpointError(
                f"{folder} holds no tokenizer; "
                "expected tokenizer.json, or vocab.json and merges.txt"
            )
        special = _special_tokens(folder)
        with files.explaining(folder, "the tokenizer cannot be read"):
            if whole.is_file():
                backend = tokenizers.Tokenizer.from_file(str(whole))
            else:
                backend = _gpt2_backend(vocab, merges)
            if not backend.get_vocab_size():
                raise ValueError("it has no tokens")
            largest = max(backend.get_vocab(with_added_tokens=True).values())
            if largest > _MAX_ID:  # the library makes lists as long as that
                raise ValueError(f"a token has the id {largest}")
            return cls(backend, eos_token=special.get("eos"), bos_token=special.get("bos"))

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._serialized)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``, without any begin or end token added.

        Args:
          text: the text.
          allow_special: read the names of special tokens, such as ``<|endoftext|>``, as those
            tokens. By default they are text like any other, since a prompt may come from anyone.

        Raises:
          PromptError: ``text`` is not a string, or not one that UTF-8 can express.
        """
        if not isinstance(text, str):
            raise PromptError(f"the text must be a string, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds a lone surrogate at character {error.start}, which is not "
                "Unicode text; remove it, or decode the input with errors='replace'"
            ) from None
        backend = self._with_special if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing.

        Raises:
          PromptError: an id is negative or not an integer.
        """
        try:
            ids = [int(i) for i in ids]
            return self._plain.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError, ValueError):
            raise PromptError("token ids must be non-negative integers") from None

    def save(self, folder: str | os.PathLike):
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as ``transformers`` reads them.

        Raises:
          CheckpointError: the folder cannot be written.
        """
        folder = Path(folder)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # transformers would otherwise delete blanks before punctuation on decoding.
            "clean_up_tokenization_spaces": False,
        }
        for key, token_id in (("eos_token", self.eos_token_id), ("bos_token", self.bos_token_id)):
            if token_id is not None:
                config[key] = self._plain.id_to_token(token_id)
        with files.explaining(folder, "cannot be written", "check the path and free space"):
            folder.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(folder / "tokenizer.json") as path:
                path.write_text(self._serialized, encoding="utf-8")
            with files.atomic_path(folder / "tokenizer_config.json") as path:
                files.write_json(path, config)


def _gpt2_backend(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019) from its vocabulary and merge list."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    # The library drops entries it does not understand.
    if backend.get_vocab() != files.read_json(vocab):
        raise ValueError(f"{vocab.name} does not map tokens to ids")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(_END_OF_TEXT) is not None:
        backend.add_special_tokens([_END_OF_TEXT])
    return backend


def _special_tokens(folder: Path) -> dict[str, str]:
    """``eos`` and ``bos`` as the folder's JSON files name them, where they do."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        fields = files.read_json(folder / name)
        for key in ("eos", "bos"):
            token = fields.get(f"{key}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found
