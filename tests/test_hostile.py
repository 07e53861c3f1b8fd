"""Hostile and damaged input: a typed error or a correct text, never a traceback or a hang."""

import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import toys
from hypothesis import example, given, settings

import ssd_jax
from ssd_jax.errors import SsdError
from ssd_jax.stack import Stack

HERE = Path(__file__).parent


def test_damaged_files_are_refused_or_read_in_bounded_time_and_memory(record_property):
    """A short form of ``python tests/fuzzing.py``, in a process of limited address space."""
    argv = [sys.executable, str(HERE / "fuzzing.py"), "--cases", "50", "--seed", "7"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"(\d+) cases: (.*?) \(", done.stdout)
    assert len(tried) >= 14
    cases = sum(int(count) for count, _ in tried)
    record_property("tried", f"{cases} damaged files of {len(tried)} formats")
    # Else nothing was damaged. Of what merely names special tokens nothing need be refused.
    assert sum("refused" in what for _, what in tried) >= 13


@pytest.fixture(scope="module")
def stack():
    tokenizer = toys.byte_tokenizer()
    oracle = toys.model(0, vocab_size=tokenizer.vocab_size, layers=1, n_positions=64)
    return Stack(oracle, (toys.blend(oracle, 0.1),), toys.katz(tokenizer.vocab_size), tokenizer)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
@example("")
@example("\x00\x01\x1b[2J\x7f")
@example("\ud800 lone surrogate")
@example("<|endoftext|>")
@example(" " * 2**20)
@example("\u202e\u200b\ufeff" * 9)
@example("e\u0301" * 20)
def test_any_text_is_continued_alike_or_refused(stack, prompt):
    texts = []
    for mode in ("baseline", "staged"):
        try:
            texts.append(ssd_jax.generate(stack, prompt, mode=mode, max_new_tokens=8).tokens)
        except SsdError as error:
            texts.append(str(error))
            assert "\n" not in str(error)
    assert texts[0] == texts[1]


def test_special_tokens_in_a_prompt_are_text(stack):
    special = stack.tokenizer.encode("<|endoftext|>", allow_special=True)
    plain = stack.tokenizer.encode("<|endoftext|>")
    assert len(special) == 1 and len(plain) > 1
    named = ssd_jax.generate(stack, "<|endoftext|>", max_new_tokens=4)
    assert named.tokens == ssd_jax.generate(stack, plain, max_new_tokens=4).tokens


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        3.5,
        b"bytes",
        {"a": 1},
        [1.5],
        [None],
        [True],
        [[]],
        [["a"]],
        pytest.param(object(), id="object"),
        [-1],
        [10**9],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused(stack, prompt):
    with pytest.raises(SsdError):
        ssd_jax.generate(stack, prompt, max_new_tokens=4)


def test_arrays_of_any_integer_type_are_prompts(stack):
    expected = ssd_jax.generate(stack, [5, 6], max_new_tokens=4).tokens
    for dtype in (np.int8, np.uint16, np.int64):
        assert ssd_jax.generate(stack, np.array([5, 6], dtype), max_new_tokens=4).tokens == expected
