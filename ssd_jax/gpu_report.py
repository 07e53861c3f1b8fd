"""What the decode loop becomes on a GPU that need not be there: kernels, copies, graphs.

The real :func:`ssd_jax.decode.decode` is compiled for a described device, with the shapes of
GPT-2 Large and of a small draft; arrays are shapes only, so that nothing is allocated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax import cli, xla_flags
from ssd_jax import decode as engine
from ssd_jax.compiled import (
    GPU_TARGETS,
    Kernel,
    cache_sized_copies,
    described,
    gpu_device,
    in_a_graph,
    main_loop,
)
from ssd_jax.errors import SsdError
from ssd_jax.files import atomic_path
from ssd_jax.gpt2 import GPT2Config, abstract
from ssd_jax.ngram import NGramTables
from ssd_jax.plan import MAX_TRIGRAM_BRANCH, Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.sampling import Sampling

ORACLE = GPT2Config(n_layer=36, n_embd=1280, n_head=20)  # GPT-2 Large
DRAFT = GPT2Config(n_layer=3, n_embd=576, n_head=9)  # 41.5M, 28.9M of them the embedding
TEXT = 1024
BASELINE = Plan.baseline()
# An oracle pass of 32 rows, 3 rounds of the draft, trigram and look-up.
STAGED = Plan(width=32, drafts=(DraftPlan(rounds=3),), ngram=NGramPlan(), depth=12, nodes=64)
_TRIGRAM_CONTEXTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Loop:
    """One compiled decode loop.

    Attributes:
      kernels: what one round launches, see :func:`ssd_jax.compiled.main_loop`.
      control: loops and conditionals inside the round.
      copies: instructions that write a whole cache anew.
      one_graph: the loop is part of one CUDA graph; ``None`` where XLA's log does not tell.
      hlo: the optimised program.
      seconds: lowering and compiling took.
      layers: of each model.
    """

    kernels: list[Kernel]
    control: int
    copies: list[str]
    one_graph: bool | None
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
      NotImplementedError, RuntimeError: the extra ``aot`` is not installed (raised by JAX).
    """
    _describe_cudnn()
    oracle = dataclasses.replace(ORACLE, n_layer=layers)
    kinds: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention="cudnn")
    configs = (oracle, *(DRAFT for _ in plan.drafts))
    models = tuple(abstract(config, **kinds) for config in configs)
    capacities = Capacities.of(plan, TEXT)
    one, text, eos = (np.zeros(shape, np.int32) for shape in ((1,), (1, TEXT), (1, 1)))
    state = jax.eval_shape(
        lambda models: engine.init_state(models, text, one, one, eos, capacities), models
    )
    sampling = jax.eval_shape(lambda: Sampling.create(1, temperature=1.0, top_k=50))
    policy = jax.eval_shape(lambda: Policy.of(plan))
    arguments = (models, _tables(plan), state, sampling, policy, one)
    started = time.perf_counter()
    lowered = engine.decode.lower(*described(arguments, gpu_device(target)), capacities=capacities)
    with _captured_stderr() as log:
        hlo = lowered.compile().as_text() or ""
    seconds = time.perf_counter() - started
    loop = main_loop(hlo)
    shapes = {x.shape for cache in state.caches for x in (*cache.keys, *cache.values)}
    return Loop(
        kernels=loop.kernels,
        control=loop.control,
        copies=cache_sized_copies(hlo, shapes),
        one_graph=in_a_graph(log[0], loop.name) if _LOGGED in log[0] else None,
        hlo=hlo,
        seconds=seconds,
        layers=tuple(config.n_layer for config in configs),
    )


def _describe_cudnn() -> None:
    """JAX asks the installed cuDNN, of 900 MB, for no more than its version when it traces
    attention. Where there is none, the described device's answers."""
    from jax._src.lib import cuda_versions as module

    cuda_versions: Any = module
    if cuda_versions is not None:
        try:
            cuda_versions.cudnn_get_version()
        except RuntimeError:
            cuda_versions.cudnn_get_version = lambda: 91000


_LOGGED = "command_buffer_conversion_pass"


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """What XLA writes to file descriptor 2 meanwhile, as the list's only entry afterwards."""
    log: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            log.append(file.read().decode(errors="replace"))


def _tables(plan: Plan) -> NGramTables | None:
    if not plan.uses_trigram:
        return None
    array: Any = jax.ShapeDtypeStruct
    rows = _TRIGRAM_CONTEXTS + ORACLE.vocab_size + 1
    return NGramTables(
        buckets=array((_TRIGRAM_CONTEXTS // 4, 16), jnp.uint32),
        salt=array((), jnp.uint32),
        tokens=array((rows, MAX_TRIGRAM_BRANCH), jnp.int32),
        log_probs=array((rows, MAX_TRIGRAM_BRANCH), jnp.float32),
        vocab_size=ORACLE.vocab_size,
    )


def summary(baseline: Loop, staged: Loop) -> dict[str, Any]:
    """The figures that ``--json`` prints."""
    copies = (*baseline.copies, *staged.copies)
    graphs = (baseline.one_graph, staged.one_graph)
    return {
        "baseline.kernels_per_layer": round(baseline.per_layer, 2),
        "baseline.kernels_per_step": len(baseline.kernels),
        "baseline.kernels_outside_models": len(baseline.outside),
        "staged.kernels_per_layer": round(staged.per_layer, 2),
        "staged.kernels_per_draft_pass": len(staged.of_model(1)),
        "staged.kernels_per_round": len(staged.kernels),
        "staged.kernels_outside_models": len(staged.outside),
        "staged.kernels_catching_up": len(staged.catching_up),
        "staged.control_nodes": staged.control,
        "cache_sized_copies": len(copies),
        "single_graph": None if None in graphs else all(graphs),
        "baseline.compile_seconds": round(baseline.seconds, 1),
        "staged.compile_seconds": round(staged.seconds, 1),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


_COUNTED = """\
A kernel is every fusion, library or custom call, copy and unfused operation of one trip of the
decode loop, condition included; loops inside it (levels of the n-gram, rounds of the draft,
catching up) count once however often they run, conditionals with both branches. Loops and
conditionals themselves are control nodes."""
_EXAMPLES = """\
examples:
  {0}                                 both loops for an H200, all layers
  {0} --target rtx4090 --layers 2     sooner, kernels a layer are the same
  {0} --json --hlo hlo > report.json  for a program, and the compiled code
"""

_LINES = (
    ("kernels per oracle layer, baseline", "baseline.kernels_per_layer"),
    ("kernels per oracle layer, staged", "staged.kernels_per_layer"),
    ("kernels per baseline step", "baseline.kernels_per_step"),
    ("kernels per staged round", "staged.kernels_per_round"),
    ("kernels per draft pass", "staged.kernels_per_draft_pass"),
    ("kernels of a draft's catching up", "staged.kernels_catching_up"),
    ("kernels outside the models, baseline", "baseline.kernels_outside_models"),
    ("kernels outside the models, staged", "staged.kernels_outside_models"),
    ("control nodes of a staged round", "staged.control_nodes"),
    ("cache-sized copies", "cache_sized_copies"),
    ("each loop is one CUDA graph", "single_graph"),
    ("seconds to compile, baseline", "baseline.compile_seconds"),
    ("seconds to compile, staged", "staged.compile_seconds"),
    ("XLA_FLAGS", "xla_flags"),
)


def build_parser(prog: str = "gpu_report.py") -> cli.Parser:
    parser = cli.Parser(
        prog=prog,
        description="Compile the decode loop for a GPU that need not be there, with the shapes of "
        "GPT-2 Large and a draft of 41.5M parameters (3 layers of 576), in bfloat16, and count "
        "what it launches. Needs the extra 'aot'.",
        epilog=f"{_COUNTED}\n\n{_EXAMPLES.format(prog)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=sorted(GPU_TARGETS), default="h200")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--hlo", metavar="DIR", help="write the optimised HLO of both loops there")
    parser.add_argument(
        "--layers",
        metavar="L",
        type=cli.positive_int,
        default=ORACLE.n_layer,
        help=f"layers of the oracle (default: {ORACLE.n_layer}); fewer compile sooner",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "gpu_report.py") -> int:
    """Entry point of ``scripts/gpu_report.py``; returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    # Read by XLA when it starts, so that this command takes a process of its own.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    os.environ["TF_CPP_VMODULE"] = f"{_LOGGED}=2"
    if xla_flags.known():
        xla_flags.add()
    return cli.run_command(lambda: _report(args.target, args.layers, args.hlo, args.json))


def _report(target: str, layers: int, folder: str | None, as_json: bool) -> None:
    jax.config.update("jax_platforms", "cpu")  # the GPU is described, not used
    loops = {}
    for name, plan in (("baseline", BASELINE), ("staged", STAGED)):
        try:
            loops[name] = compile_loop(plan, target, layers)
        except (NotImplementedError, RuntimeError) as error:
            raise SsdError(
                f"cannot compile for a described GPU ({error}); install the extra 'aot'"
            ) from error
        if folder is not None:
            path = Path(folder) / f"{name}-{target}.hlo.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(loops[name].hlo, encoding="utf-8")
    figures = summary(loops["baseline"], loops["staged"])
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{target}, oracle of {layers} layers\n\n{_COUNTED}\n")
    for label, key in _LINES:
        print(f"{label:<40} {figures[key]}")
