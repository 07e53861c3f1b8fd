"""Text as it grows: tokens to characters, and the stops that end it.

No JAX here: this looks on between two calls of the compiled loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssd_jax.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what the bytes of a character turn into until the last of them is there


class Detokenizer:
    """The text of a list of tokens, one token at a time.

    Decodes a few of the newest tokens at a time. The pieces add up to the text of all of them for
    any tokenizer that decodes a token by looking at no more than what stands before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.context: list[int] = []  # tokens whose characters are complete
        self.fresh: list[int] = []  # tokens since
        self.known = 0  # characters of both that are given out

    def add(self, token: int) -> str:
        """What a token adds: whole characters only, so perhaps nothing yet."""
        self.fresh.append(token)
        text = self.tokenizer.decode(self.context + self.fresh)
        whole = text.rstrip(_INCOMPLETE)
        piece, self.known = whole[self.known :], max(self.known, len(whole))
        if whole == text:
            self.context, self.fresh = self.fresh, []
            self.known = len(self.tokenizer.decode(self.context))
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        return self.tokenizer.decode(self.context + self.fresh)[self.known :] if self.fresh else ""


class Follower:
    """Reads a continuation as it grows, and knows where it stops.

    Args:
      tokenizer: ``None`` leaves the text empty.
      eos_ids: end-of-text ids, which are no part of the text.
      stop_strings: the text ends before the first of them that it contains.
      stop_sequences: the text ends before the tokens of one of them.

    Attributes:
      text: the text up to now.
      read: tokens read.
      stop: what ended the text: one of the stops, or ``None`` while there was none. ``read`` then
        counts the token that completed it as the last one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
        stop_sequences: Iterable[Sequence[int]] = (),
    ):
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.eos_ids = frozenset(eos_ids)
        self.stop_strings = stop_strings
        self.stop_sequences = tuple(map(tuple, stop_sequences))
        self.text = ""
        self.read = 0
        self.stop: str | tuple[int, ...] | None = None
        self._longest = max(map(len, self.stop_sequences), default=0)
        self._recent: list[tuple[int, int]] = []  # newest tokens, and where their text begins
        self._shown = 0

    def feed(self, tokens: Sequence[int], last: bool) -> str:
        """Read on, and give out the text that can no longer become part of a stop.

        Args:
          tokens: the next ones of the continuation. Those after a stop are not read.
          last: whether they are the last ones.
        """
        for token in tokens:
            if self.stop is None:
                self._read(token)
        if last and self.stop is None and self.detokenizer:
            self._append(self.detokenizer.flush())
        ended = last or self.stop is not None
        end = len(self.text) if ended else self._certain()
        piece, self._shown = self.text[self._shown : end], max(self._shown, end)
        return piece

    def _read(self, token: int) -> None:
        self.read += 1
        if self._longest:
            self._recent = [*self._recent, (token, len(self.text))][-self._longest :]
        if self.detokenizer and token not in self.eos_ids:
            self._append(self.detokenizer.add(token))
        newest = tuple(token for token, _ in self._recent)
        for sequence in self.stop_sequences:
            if self.stop is None and newest[-len(sequence) :] == sequence:
                self.stop = sequence
                self.text = self.text[: self._recent[-len(sequence)][1]]

    def _append(self, piece: str) -> None:
        """Add to the text, and cut it before the first stop string that this completes."""
        reach = len(self.text)
        self.text += piece
        found = [
            (start, stop)
            for stop in self.stop_strings
            if (start := self.text.find(stop, max(0, reach - len(stop) + 1))) >= 0
        ]
        if piece and found:
            start, self.stop = min(found)
            self.text = self.text[:start]

    def _certain(self) -> int:
        """Characters that stay whatever comes next."""
        end = len(self.text)
        for stop in self.stop_strings:
            longest = min(len(stop) - 1, len(self.text))
            part = next(n for n in range(longest, -1, -1) if self.text.endswith(stop[:n]))
            end = min(end, len(self.text) - part)
        newest = tuple(token for token, _ in self._recent)
        for sequence in self.stop_sequences:
            for size in range(min(len(sequence) - 1, len(newest)), 0, -1):
                if newest[-size:] == sequence[:size]:
                    end = min(end, self._recent[-size][1])
                    break
        return end
