"""Sessions: calls that share what the caches hold of the text before."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ssd_jax.batch import Batch, GenerationResult
from ssd_jax.errors import PromptError
from ssd_jax.generate import PlanLike, Prompt, Stream, encode_prompt, resolve_plan
from ssd_jax.generation_config import GenerationConfig, check_count, one_configuration
from ssd_jax.kv_cache import KVCache
from ssd_jax.plan import Capacities
from ssd_jax.run import Row, Run
from ssd_jax.stack import Stack


class Session:
    """Calls of one user after another, of prompts that begin alike: a conversation, or an editor.

    Each call takes the whole prompt, and gives what :func:`ssd_jax.generate` would give. The keys
    and values of the text before are kept, and what the new prompt shares with its beginning is
    not computed again (``stats.reused_tokens``). Tokens are compared; a prompt given as text is
    tokenised anew. Memory is bounded: one set of caches, of ``max_tokens`` positions. A call that
    follows a plan of other capacities (``tune`` finds one for greedy decoding and one for
    sampling) starts afresh.

    Args:
      stack: from :func:`ssd_jax.load`.
      mode, plan: as for :func:`ssd_jax.generate`.
      max_tokens: positions, of prompt and continuation together; by default the oracle's context.

    Raises:
      SamplingError: ``max_tokens`` is out of range.
      PlanError: see :func:`ssd_jax.generate`.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        mode: str = "staged",
        plan: PlanLike = None,
        max_tokens: int | None = None,
    ):
        context = stack.oracle.config.n_positions
        self.max_tokens = context if max_tokens is None else max_tokens
        check_count("max_tokens", self.max_tokens, 1, context)
        resolve_plan(stack, mode, plan, sampled=False)  # for its errors
        self.stack, self.mode, self.plan = stack, mode, plan
        self._batch: Batch | None = None  # of the call before
        self._stream: Stream | None = None

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        **overrides: Any,
    ) -> GenerationResult:
        """Continue a prompt. For arguments and errors see :func:`ssd_jax.generate`.

        Raises:
          PromptError: also, prompt and continuation need more than ``max_tokens`` positions.
        """
        return self.stream(prompt, config, **overrides).follow(on_text)

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, **overrides: Any
    ) -> Stream:
        """:func:`ssd_jax.generate.stream` in this session. Closes the session's stream before."""
        tokens = encode_prompt(self.stack, prompt)
        own = one_configuration(config, overrides)
        row = Row(self.stack, tokens, own, follow=True)
        needed = min(len(tokens) + own.max_new_tokens, self.stack.oracle.config.n_positions)
        if needed > self.max_tokens:
            raise PromptError(
                f"prompt and continuation need {needed} positions but the session holds "
                f"{self.max_tokens}; lower max_new_tokens, or make it with a larger max_tokens"
            )
        plan, _ = resolve_plan(self.stack, self.mode, self.plan, sampled=own.sampled)
        if self._stream is not None:
            self._stream.close()
        caches = self._kept(tokens, Capacities.of(plan, self.max_tokens))
        run = Run(self.stack, [row], plan, capacity=self.max_tokens, caches=caches)
        self._batch, self._stream = run.batch, Stream(run)
        return self._stream

    def _kept(self, tokens: list[int], capacities: Capacities) -> tuple[KVCache, ...] | None:
        """The caches of the call before, rolled back to what the prompt shares with its text."""
        batch, self._batch = self._batch, None
        if batch is None or not batch.intact or batch.capacities != capacities:
            return None
        before = batch.text[0, : batch.length[0]].tolist()
        # The newest token, whose successor is asked for, is in no cache.
        pairs = zip(before, tokens[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        lengths = [np.minimum(cache.length, np.int32(shared)) for cache in batch.state.caches]
        return tuple(
            dataclasses.replace(cache, length=length)
            for cache, length in zip(batch.state.caches, jax.device_put(lengths), strict=True)
        )
