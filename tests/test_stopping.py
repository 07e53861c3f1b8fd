"""Text as it grows: against decoding every prefix anew."""

import numpy as np
import pytest
import toys

from ssd_jax.stopping import Detokenizer, Follower


@pytest.fixture(scope="module")
def tokenizer():
    return toys.byte_tokenizer()


def some_tokens(tokenizer, seed: int) -> list[int]:
    """Real text, cut and mixed with random tokens: characters whole, broken and half."""
    rng = np.random.default_rng(seed)
    text = tokenizer.encode("naïve 漢字 def f(x): return 😀 x + 1\n")
    noise = rng.integers(0, tokenizer.vocab_size, 12).tolist()
    cut = int(rng.integers(0, len(text)))
    return [*text[cut:], *noise, *text[: int(rng.integers(0, len(text)))]]


@pytest.mark.parametrize("seed", range(30))
def test_pieces_add_up_and_hold_whole_characters(tokenizer, seed):
    tokens = some_tokens(tokenizer, seed)
    reader, text = Detokenizer(tokenizer), ""
    for end, token in enumerate(tokens, start=1):
        text += reader.add(token)
        whole = tokenizer.decode(tokens[:end])
        assert whole.startswith(text) and whole.rstrip("\ufffd") == text.rstrip("\ufffd")
    assert text + reader.flush() == tokenizer.decode(tokens)


def naive(tokenizer, tokens, strings, sequences):
    """The text, the tokens kept and the stop, from the definition."""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        if end < len(tokens):
            text = text.rstrip("\ufffd")
        found = [(text.find(s), s) for s in strings if s in text]
        if found:
            return text[: min(found)[0]], end, min(found)[1]
        for sequence in sequences:
            if tuple(tokens[max(0, end - len(sequence)) : end]) == sequence:
                before = tokenizer.decode(tokens[: end - len(sequence)]).rstrip("\ufffd")
                return before, end, sequence
    return tokenizer.decode(tokens), len(tokens), None


@pytest.mark.parametrize("seed", range(60))
def test_stops_are_found_where_they_complete_in_chunks_of_any_size(tokenizer, seed):
    rng = np.random.default_rng(1000 + seed)
    tokens = tokenizer.encode("ab é漢字 abab return x aab\n\n" * 2)
    tokens = [*tokens[: int(rng.integers(5, len(tokens)))], *some_tokens(tokenizer, seed)]
    text = tokenizer.decode(tokens)
    strings, sequences = [], []
    for _ in range(int(rng.integers(0, 3))):
        start = int(rng.integers(0, len(text) - 4))
        strings.append(text[start : start + int(rng.integers(1, 5))].rstrip("\ufffd") or "漢")
    for _ in range(int(rng.integers(0, 3))):
        start = int(rng.integers(0, len(tokens) - 3))
        sequences.append(tuple(tokens[start : start + int(rng.integers(1, 4))]))
    expected, kept, stop = naive(tokenizer, tokens, strings, sequences)
    for size in (1, 3, 7, len(tokens)):
        follower, shown = Follower(tokenizer, (), strings, sequences), ""
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            shown += follower.feed(chunk, last=start + size >= len(tokens))
            # What has been shown is never taken back.
            assert expected.startswith(shown)
        assert (shown, follower.text, follower.read) == (expected, expected, kept)
        assert follower.stop == stop


def test_nothing_of_a_stop_is_shown_while_it_may_still_come(tokenizer):
    tokens = tokenizer.encode("one STO two STOP three")
    follower = Follower(tokenizer, (), ["STOP"])
    pieces = [follower.feed([token], last=False) for token in tokens]
    assert "".join(pieces) == follower.text == "one STO two "
    shown = ["".join(pieces[:i]) for i in range(len(pieces))]
    assert not any(s.endswith(("S", "ST")) for s in shown)  # "STO" is shown once a blank follows
    assert follower.stop == "STOP" and tokenizer.decode(tokens[: follower.read]).endswith("STOP")


def test_end_of_text_is_no_text_and_no_tokenizer_no_text(tokenizer):
    follower = Follower(tokenizer, [0])
    tokens = [*tokenizer.encode("ab"), 0]
    assert follower.feed(tokens, last=True) == "ab" and follower.read == len(tokens)
    bare = Follower(None, (), (), [(5, 6)])
    assert bare.feed([4, 5, 6, 7], last=False) == "" and (bare.read, bare.stop) == (3, (5, 6))
