"""``generate`` and its relatives: from prompts to text, with the stack's drafts on or off."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np

from ssd_jax import tuned
from ssd_jax.batch import GenerationResult
from ssd_jax.errors import PromptError
from ssd_jax.generation_config import (
    GenerationConfig,
    check_count,
    configurations,
    one_configuration,
)
from ssd_jax.plan import DEFAULT, Plan
from ssd_jax.run import Row, Run, run_in_groups
from ssd_jax.stack import Stack

BATCH_SIZE = 8

Prompt = str | Sequence[int]
PlanLike = Plan | str | os.PathLike | None
Config = GenerationConfig | Sequence[GenerationConfig] | None


@overload
def generate(
    stack: Stack,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    mode: str = ...,
    plan: PlanLike = ...,
    on_text: Callable[[str], None] | None = ...,
    batch_size: int = ...,
    num_return_sequences: int,
    **overrides: Any,
) -> list[GenerationResult]: ...


@overload
def generate(
    stack: Stack,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    mode: str = ...,
    plan: PlanLike = ...,
    on_text: Callable[[str], None] | None = ...,
    batch_size: int = ...,
    **overrides: Any,
) -> GenerationResult: ...


@overload
def generate(
    stack: Stack,
    prompt: Sequence[Prompt],
    config: Config = None,
    *,
    mode: str = ...,
    plan: PlanLike = ...,
    on_text: Callable[[str], None] | None = ...,
    batch_size: int = ...,
    **overrides: Any,
) -> list[GenerationResult]: ...


def generate(
    stack: Stack,
    prompt: Prompt | Sequence[Prompt],
    config: Config = None,
    *,
    mode: str = "staged",
    plan: PlanLike = None,
    on_text: Callable[[str], None] | None = None,
    batch_size: int = BATCH_SIZE,
    **overrides: Any,
) -> GenerationResult | list[GenerationResult]:
    """Continue a prompt, or several. Mode, plan and batch change the speed, never the text.

    Args:
      stack: from :func:`ssd_jax.load`.
      prompt: text, or token ids; an empty one starts from the beginning-of-text token. Or a list
        of texts or of lists of token ids.
      config: what is asked for, of all prompts or of each.
      mode: ``baseline``, ``speculative`` or ``staged``.
      plan: a :class:`~ssd_jax.plan.Plan`, a JSON file, or ``"default"`` for the mode's own. Left
        out, mode ``staged`` follows what :func:`ssd_jax.tune` found for this device and stack.
      on_text: called with each new piece of the text of a single prompt (:func:`stream`).
      batch_size: rows decoded together at most.
      overrides: fields of :class:`GenerationConfig`, instead of those of ``config``; one that is a
        number may be a list, one entry for each prompt.

    Returns:
      One result, or for a list of prompts or with ``num_return_sequences`` above 1 a list: the
      first prompt's continuations, the second's, and so on.

    Raises:
      PromptError: no tokenizer for a text prompt, an id out of range, an empty prompt without
        a beginning-of-text token, or a prompt longer than the context.
      SamplingError: an option that is unknown or out of range.
      PlanError: unknown mode, or a plan that asks for stages the stack does not have.
    """
    prompts, several = _prompts(prompt)
    encoded = [encode_prompt(stack, each) for each in prompts]
    configs = configurations(config, overrides, len(prompts))
    rows = [
        Row(stack, tokens, own, follow=on_text is not None)
        for tokens, given in zip(encoded, configs, strict=True)
        for own in given.samples()
    ]
    check_count("batch_size", batch_size, 1)
    plan, _ = resolve_plan(stack, mode, plan, sampled=any(row.config.sampled for row in rows))
    if on_text is not None:
        if several or len(rows) > 1:
            raise PromptError("on_text follows one text; leave it out for several")
        return Stream(Run(stack, rows, plan)).follow(on_text)
    results = run_in_groups(stack, rows, plan, batch_size)
    return results if several or len(rows) > 1 else results[0]


def stream(
    stack: Stack,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    mode: str = "staged",
    plan: PlanLike = None,
    **overrides: Any,
) -> Stream:
    """Continue a prompt and give out the text while it is written.

    Takes the same steps as :func:`generate`, in runs of a few tokens. Arguments and errors are the
    same too; what is wrong is found, and the program compiled, before the first piece is asked for.
    """
    tokens = encode_prompt(stack, prompt)
    own = one_configuration(config, overrides)
    plan, _ = resolve_plan(stack, mode, plan, sampled=own.sampled)
    return Stream(Run(stack, [Row(stack, tokens, own, follow=True)], plan))


class Stream:
    """An iterator over the pieces of a text, made by :func:`stream` or
    :meth:`ssd_jax.session.Session.stream`.

    The pieces add up to the text of the result. Each holds whole characters, and nothing that may
    still turn out to belong to a stop. Nothing runs between two pieces, nor after :meth:`close`,
    which the end of a ``with`` block calls.

    Attributes:
      result: the :class:`GenerationResult` once the pieces are exhausted, until then ``None``.
    """

    def __init__(self, run: Run):
        self.result: GenerationResult | None = None
        self._pieces = self._read(run)

    def _read(self, run: Run) -> Generator[str]:
        for (piece,) in run:
            if piece:
                yield piece
        (self.result,) = run.results()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def follow(self, on_text: Callable[[str], None] | None = None) -> GenerationResult:
        """Read to the end, calling a function with each piece.

        Raises:
          PromptError: the stream was closed before.
        """
        for piece in self:
            if on_text is not None:
                on_text(piece)
        if self.result is None:
            raise PromptError("the stream was closed before its text ended; start another")
        return self.result

    def close(self) -> None:
        """End the stream where it is."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _prompts(given: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether they came as a list of prompts rather than as one."""
    if isinstance(given, str):
        return [given], False
    axes = getattr(given, "ndim", None)  # of an array
    if axes is None:
        axes = 1 + (isinstance(given, list | tuple) and any(map(_is_sequence, given)))
    if axes < 2:
        return [given], False
    if not len(given):
        raise PromptError("the list of prompts is empty; give at least one")
    return list(given), True


def _is_sequence(item: Any) -> bool:
    return isinstance(item, Sequence) or getattr(item, "ndim", 0) > 0


def encode_prompt(stack: Stack, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, checked against vocabulary and context.

    Raises:
      PromptError: see :func:`generate`.
    """
    if isinstance(prompt, str):
        if stack.tokenizer is None:
            raise PromptError(
                "this stack has no tokenizer; load one with tokenizer=, or pass token ids"
            )
        tokens = stack.tokenizer.encode(prompt)
    else:
        tokens = _token_ids(prompt, stack.vocab_size)
    if not tokens:
        if stack.bos_id is None:
            raise PromptError("the prompt is empty and the model has no beginning-of-text token")
        tokens = [stack.bos_id]
    context = stack.oracle.config.n_positions
    if len(tokens) > context:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens but the oracle's context is {context}; shorten it"
        )
    return tokens


def _token_ids(prompt: Sequence[int], vocab: int) -> list[int]:
    if isinstance(prompt, bytes | bytearray):
        raise PromptError("a prompt is text or token ids, not bytes; decode them first")
    try:
        ids = list(np.asarray(prompt).tolist() if hasattr(prompt, "__array__") else prompt)
    except TypeError:
        raise PromptError(f"a prompt is text or token ids, not {type(prompt).__name__}") from None
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise PromptError(f"token ids must be integers, not {token!r}")
        if not 0 <= token < vocab:
            raise PromptError(f"token id {token} is outside the vocabulary (0 to {vocab - 1})")
    return [int(token) for token in ids]


def resolve_plan(
    stack: Stack, mode: str, plan: Plan | str | os.PathLike | None, *, sampled: bool
) -> tuple[Plan, str]:
    """The plan that ``generate`` follows, and in words where it comes from.

    Args:
      stack: the stack.
      mode: of :data:`~ssd_jax.plan.MODES`.
      plan: a plan, a file, ``"default"``, or ``None`` for the tuned plan, if there is one.
      sampled: whether the temperature is above 0.

    Raises:
      PlanError: see :func:`generate`.
    """
    default = Plan.for_mode(mode, len(stack.drafts), stack.ngram is not None)
    if mode == "staged" and jax.default_backend() == "cpu":
        oracle = stack.oracle
        shares = [draft.config.multiplied / oracle.config.multiplied for draft in stack.drafts]
        default = default.on_cpu(shares, oracle.products, sampled=sampled)
    if plan is None and mode == "staged":
        found = tuned.load(stack)
        plan = found.plans.get(tuned.KINDS[sampled]) if found else None
        if plan is not None:
            return plan, f"tuned for this device ({tuned.path_for(stack)})"
    if plan is None or plan == DEFAULT:
        return default, "default"
    source = "given"
    if not isinstance(plan, Plan):
        source = os.fspath(plan)
        plan = Plan.load(plan)
    plan.check_stack(len(stack.drafts), stack.ngram is not None)
    return plan, source
