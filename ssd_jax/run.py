"""Running batches: what each row is asked for, reading along, stopping."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

from ssd_jax.batch import Batch, Ending, GenerationResult, batch_bucket, bucket
from ssd_jax.errors import SamplingError
from ssd_jax.generation_config import SAMPLING_FIELDS, GenerationConfig
from ssd_jax.kv_cache import KVCache
from ssd_jax.plan import Plan
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack
from ssd_jax.stopping import Follower

# A text that is streamed, or that may be stopped from outside the loop, is looked at after so many
# tokens, or seconds if they come more slowly.
CHUNK = 16
CHUNK_SECONDS = 0.1


class Row:
    """One row of a batch: what is asked for, and how far it got.

    Args:
      stack: the stack.
      tokens: the prompt.
      config: of one continuation.
      follow: whether its text is read as it grows. One that may be stopped is in any case.

    Attributes:
      ending: how it ended, once it has.

    Raises:
      SamplingError: the options do not fit the stack.
    """

    def __init__(
        self, stack: Stack, tokens: list[int], config: GenerationConfig, *, follow: bool = False
    ):
        _check_fit(stack, config)
        self.tokens, self.config = tokens, config
        self.eos_ids = config.eos_ids(stack.eos_ids)
        self.ending: Ending | None = None
        self.follower: Follower | None = None
        if follow or config.interrupts:
            stops = (config.stop_strings, config.stop_token_sequences)
            self.follower = Follower(stack.tokenizer, self.eos_ids, *stops)

    def look(self, batch: Batch, index: int, seconds: float) -> str:
        """Read on; what the text has gained. Sets ``ending`` if the row has ended, or is to."""
        if self.ending is not None:
            return ""
        last = batch.finished(index)
        if self.follower is None:
            self.ending = batch.ending(index) if last else None
            return ""
        limit = self.config.max_time
        late = not last and limit is not None and seconds >= limit
        piece = self.follower.feed(batch.tokens(index)[self.follower.read :], last or late)
        text, kept = self.follower.text, self.follower.read
        if self.follower.stop is not None:
            self.ending = Ending(text, kept, "stop", self.follower.stop)
        elif late:
            self.ending = Ending(text, kept, "time")
        elif last:
            self.ending = dataclasses.replace(batch.ending(index), text=text)
        return piece


class Run:
    """A batch on its way to its end. Iterating gives the pieces of text, one for each row, that
    every few tokens bring.

    Args:
      stack: the stack.
      rows: at least one.
      plan: how much is drafted.
      size: rows of the batch, at least as many as there are.
      spent: seconds that count towards ``max_time`` already.
      capacity, caches: see :class:`~ssd_jax.batch.Batch`.
    """

    def __init__(
        self,
        stack: Stack,
        rows: Sequence[Row],
        plan: Plan,
        *,
        size: int | None = None,
        spent: float = 0.0,
        capacity: int | None = None,
        caches: tuple[KVCache, ...] | None = None,
    ):
        self.rows, self.seconds = rows, spent
        idle = (size or len(rows)) - len(rows)  # rows without a token to write are never active
        options = [row.config.sampling_options() for row in rows]
        options += [GenerationConfig().sampling_options()] * idle
        wanted = [row.config.logprobs for row in rows]
        self.batch = Batch(
            stack,
            [*(row.tokens for row in rows), *([[0]] * idle)],
            [*(row.config.max_new_tokens for row in rows), *([0] * idle)],
            Sampling.create(
                len(options),
                vocab_size=stack.vocab_size,
                **{name: [o[name] for o in options] for name in SAMPLING_FIELDS},
            ),
            plan,
            eos_ids=[*(row.eos_ids for row in rows), *([()] * idle)],
            alternatives=max((w for w in wanted if w is not None), default=None),
            capacity=capacity,
            caches=caches,
        )

    def __iter__(self) -> Iterator[list[str]]:
        began = time.perf_counter() - self.seconds
        step = 1 if any(row.follower for row in self.rows) else None  # the first text comes soon
        while True:
            self.seconds = time.perf_counter() - began
            yield [row.look(self.batch, i, self.seconds) for i, row in enumerate(self.rows)]
            ended = [i for i, row in enumerate(self.rows) if row.ending]
            self.batch.halt([i for i in ended if not self.batch.finished(i)])
            if not self.batch.running:
                break
            spent, length = self.batch.seconds, self.batch.length
            self.batch.advance(step)
            if step is not None:
                each = (self.batch.seconds - spent) / max(self.batch.length - length)
                step = min(max(int(CHUNK_SECONDS / each), 1), CHUNK)

    def results(self) -> list[GenerationResult]:
        """Of all rows, once they have ended."""
        endings = [row.ending for row in self.rows if row.ending]
        return self.batch.results(endings, [row.config.logprobs for row in self.rows])


def run_in_groups(
    stack: Stack, rows: Sequence[Row], plan: Plan, most: int
) -> list[GenerationResult]:
    """Run any number of rows, at most so many at a time."""
    context = stack.oracle.config.n_positions
    length = [min(len(row.tokens) + row.config.max_new_tokens, context) for row in rows]
    # Texts of about one length together: a batch takes as long as its longest row. All batches are
    # of one shape, for which there is one program.
    order = sorted(range(len(rows)), key=lambda i: length[i])
    groups = -(-len(rows) // most)
    size = -(-len(rows) // groups)
    results: dict[int, GenerationResult] = {}
    spent = 0.0
    for start in range(0, len(rows), size):
        group = order[start : start + size]
        run = Run(
            stack,
            [rows[i] for i in group],
            plan,
            size=batch_bucket(size),
            spent=spent,
            capacity=bucket(max(length)),
        )
        for _ in run:
            pass
        spent = run.seconds
        results |= zip(group, run.results(), strict=True)
    return [results[i] for i in range(len(rows))]


def _check_fit(stack: Stack, config: GenerationConfig) -> None:
    """Options against the vocabulary."""
    named = {
        "eos_token_id": config.eos_ids(()),
        "stop_token_sequences": [i for s in config.stop_token_sequences for i in s],
    }
    for name, ids in named.items():
        if any(not 0 <= i < stack.vocab_size for i in ids):
            raise SamplingError(
                f"{name} has an id outside the vocabulary (0 to {stack.vocab_size - 1})"
            )
    # As for the whole batch, but before the first of several batches runs.
    if config.logit_bias is not None or config.bad_words_ids is not None:
        options = {name: [value] for name, value in config.sampling_options().items()}
        Sampling.create(1, vocab_size=stack.vocab_size, **options)
    if config.stop_strings and stack.tokenizer is None:
        raise SamplingError("stop strings need a tokenizer, and this stack has none; load one")
