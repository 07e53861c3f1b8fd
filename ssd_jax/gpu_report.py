"""What the decode loop becomes on a GPU that need not be there: kernels, copies, graphs.

The real :func:`ssd_jax.decode.decode` is compiled for a described device, with the shapes of
GPT-2 Large and of a small draft; arrays are shapes only, so that nothing is allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssd_jax import decode as engine
from ssd_jax.compiled import (
    GPU_TARGETS,
    Kernel,
    cache_sized_copies,
    described,
    gpu_device,
    main_loop,
)
from ssd_jax.gpt2 import GPT2Config, abstract
from ssd_jax.ngram import NGramTables
from ssd_jax.plan import MAX_TRIGRAM_BRANCH, Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.sampling import Sampling

ORACLE = GPT2Config(n_layer=36, n_embd=1280, n_head=20)  # GPT-2 Large
DRAFT = GPT2Config(n_layer=3, n_embd=576, n_head=9)  # 41.5M, 28.9M of them the embedding
TEXT = 1024
BASELINE = Plan.baseline()
STAGED = Plan(width=32, drafts=(DraftPlan(rounds=3),), ngram=NGramPlan(), depth=12, nodes=64)
_TRIGRAM_CONTEXTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Loop:
    """One compiled decode loop.

    Attributes:
      kernels: what one round launches, see :func:`ssd_jax.compiled.main_loop`.
      control: loops and conditionals inside the round.
      copies: instructions that write a whole cache anew.
      hlo: the optimised program.
      seconds: lowering and compiling took.
      layers: of each model.
    """

    kernels: list[Kernel]
    control: int
    copies: list[str]
    hlo: str
    seconds: float
    layers: tuple[int, ...]

    def of_model(self, model: int) -> list[Kernel]:
        """The kernels of a model's pass over the tree, or in plain decoding over the root."""
        return [k for k in self.kernels if _in(k, f"model{model}") and not _in(k, "catch_up")]

    @property
    def catching_up(self) -> list[Kernel]:
        """Those of bringing caches up to date, which a round does only if one has fallen behind."""
        return [k for k in self.kernels if _in(k, "catch_up") and _in(k, r"model\d+")]

    @property
    def per_layer(self) -> float:
        """Kernels in the oracle's layers, by layer (embedding, last norm and head left out)."""
        layered = [k for k in self.of_model(0) if _in(k, r"layer\d+")]
        return len(layered) / self.layers[0]

    @property
    def outside(self) -> list[Kernel]:
        """All that belongs to no pass of a model."""
        return [k for k in self.kernels if not _in(k, r"model\d+")]


def _in(kernel: Kernel, scope: str) -> bool:
    return re.search(rf"(^|/){scope}(/|$)", kernel.scope) is not None


def compile_loop(plan: Plan, target: str = "h200", layers: int = ORACLE.n_layer) -> Loop:
    """Compile the decode of a plan for a described GPU, in bfloat16.

    Args:
      plan: a plan for :data:`ORACLE` and copies of :data:`DRAFT`.
      target: a key of :data:`ssd_jax.compiled.GPU_TARGETS`.
      layers: of the oracle, if not all.

    Raises:
      RuntimeError: the extra ``aot`` is not installed (raised by JAX).
    """
    oracle = dataclasses.replace(ORACLE, n_layer=layers)
    kinds: dict[str, Any] = dict(
        dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention="cudnn"
    )
    configs = (oracle, *(DRAFT for _ in plan.drafts))
    models = tuple(abstract(config, **kinds) for config in configs)
    capacities = Capacities.of(plan, TEXT)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.ShapeDtypeStruct((1, TEXT), jnp.int32)
    eos = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    state = jax.eval_shape(
        lambda *arrays: engine.init_state(*arrays, capacities), models, text, one, one, eos
    )
    sampling = jax.eval_shape(lambda: Sampling.create(1, temperature=1.0, top_k=50))
    policy = jax.eval_shape(lambda: Policy.of(plan))
    arguments = (models, _tables(plan), state, sampling, policy, one)
    started = time.perf_counter()
    lowered = engine.decode.lower(*described(arguments, gpu_device(target)), capacities=capacities)
    hlo = lowered.compile().as_text()
    seconds = time.perf_counter() - started
    kernels, control = main_loop(hlo)
    shapes = {x.shape for cache in state.caches for x in (*cache.keys, *cache.values)}
    copies = cache_sized_copies(hlo, shapes)
    return Loop(kernels, control, copies, hlo, seconds, tuple(c.n_layer for c in configs))


def _tables(plan: Plan) -> NGramTables | None:
    if plan.ngram is None or not plan.ngram.branch:
        return None
    array, rows = jax.ShapeDtypeStruct, _TRIGRAM_CONTEXTS + ORACLE.vocab_size + 1
    return NGramTables(
        buckets=array((_TRIGRAM_CONTEXTS // 4, 16), jnp.uint32),
        salt=array((), jnp.uint32),
        tokens=array((rows, MAX_TRIGRAM_BRANCH), jnp.int32),
        log_probs=array((rows, MAX_TRIGRAM_BRANCH), jnp.float32),
        vocab_size=ORACLE.vocab_size,
    )
