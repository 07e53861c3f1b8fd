"""The tokenizer: round trips, special tokens, hostile text and damaged files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ssd_jax.errors import CheckpointError, PromptError
from ssd_jax.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
END = "<|endoftext|>"


def tiny_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(self):\n    return self.value\n"] * 3, trainer)
    return backend


TINY = Tokenizer(tiny_backend())


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_undoes_encoding(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text
    assert all(0 <= i < TINY.vocab_size for i in ids)


def test_merges_shorten_text():
    assert len(TINY.encode("return self")) < len("return self")


def test_special_tokens_in_a_prompt_are_ordinary_text_unless_allowed():
    text = f"a{END}b"
    plain, special = TINY.encode(text), TINY.encode(text, allow_special=True)
    assert TINY.eos_token_id not in plain and special.count(TINY.eos_token_id) == 1
    assert TINY.decode(plain) == TINY.decode(special) == text
    assert TINY.decode(special, skip_special_tokens=True) == "ab"
    assert TINY.decode(plain, skip_special_tokens=True) == text
    assert TINY.encode(text) == plain  # the two ways do not disturb each other


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", 3, None, b"bytes", ["a"]])
def test_text_that_is_not_unicode_is_refused_in_one_line(text):
    with pytest.raises(PromptError) as caught:
        TINY.encode(text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_become_replacement_characters():
    euro = TINY.encode("€")
    assert len(euro) == 3
    assert TINY.decode(euro[:2]) == "\ufffd"
    assert TINY.decode(TINY.encode("a") + euro[1:] + TINY.encode("b")).count("\ufffd") >= 1


def test_ids_outside_the_vocabulary_decode_to_nothing_and_wrong_ones_are_refused():
    ids = TINY.encode("ab")
    assert TINY.decode([*ids, TINY.vocab_size + 5]) == "ab"
    assert TINY.decode([]) == ""
    for wrong in ([-1], [2**40], ["a"], [None]):
        with pytest.raises(PromptError):
            TINY.decode(wrong)


def test_saved_tokenizer_is_the_same(tmp_path):
    Tokenizer(tiny_backend(), bos_token="<|start|>").save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = f"def value(): # {END} é\n"
    assert loaded.encode(text) == TINY.encode(text)
    assert loaded.encode(text, allow_special=True) == TINY.encode(text, allow_special=True)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 0)
    assert loaded.vocab_size == TINY.vocab_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_transformers_reads_the_saved_tokenizer_alike(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    TINY.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"def f( x ) : return 'ü' , x{END}"
    assert peer(text).input_ids == TINY.encode(text, allow_special=True)
    assert peer.decode(TINY.encode(text)) == text
    assert peer.eos_token_id == TINY.eos_token_id


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_special_tokens_come_from_the_folder(tmp_path, file, as_dict):
    tiny_backend().save(str(tmp_path / "tokenizer.json"))
    token = {"content": "<|start|>", "lstrip": False} if as_dict else "<|start|>"
    (tmp_path / file).write_text(json.dumps({"eos_token": token, "pad_token": None}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (1, 0)


def test_without_special_tokens_there_are_none(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("abba") == [2, 1, 0]
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.vocab_size) == (None, None, 3)


def test_truncation_padding_and_templates_of_the_file_are_off(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a text of some length"
    assert Tokenizer.load(tmp_path).encode(text) == TINY.encode(text)


def write_pair(folder: Path, vocab: str, merges: str) -> None:
    (folder / "vocab.json").write_text(vocab)
    (folder / "merges.txt").write_text(merges)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: None,
        lambda folder: (folder / "vocab.json").write_text("{}"),
        lambda folder: tokenizers.Tokenizer(models.BPE()).save(str(folder / "tokenizer.json")),
        lambda folder: (folder / "tokenizer.json").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe{"),
        lambda folder: (folder / "tokenizer.json").write_text(tiny_backend().to_str()[:-500]),
        lambda folder: write_pair(folder, "[]", "a b\n"),
        lambda folder: write_pair(folder, '{"a": 0}', "#version: 0.2\na b\n"),
        lambda folder: write_pair(folder, '{"a": "x"}', ""),
        lambda folder: write_pair(folder, '{"a": 0, "b": "x"}', ""),
        lambda folder: write_pair(folder, "{}", ""),
    ],
)
def test_damaged_or_missing_files_are_refused_in_one_line(tmp_path, damage):
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_damaged_tokenizer_config_is_refused(tmp_path):
    tiny_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        Tokenizer.load(tmp_path)


def test_missing_folder_and_unwritable_target_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer.load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        TINY.save(tmp_path / "file")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_gpt2_vocabulary_encodes_as_published():
    gpt2 = Tokenizer.load(SHARED / "gpt2-tokenizer")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.vocab_size == 50257
    assert gpt2.eos_token_id == gpt2.bos_token_id == 50256
    with gzip.open(SHARED / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == 164
    for prompt in prompts:
        assert gpt2.decode(gpt2.encode(prompt)) == prompt
