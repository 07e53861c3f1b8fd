"""Looking at what XLA made of the loop, for this machine or for a GPU that is not there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Public figures of the devices, in the form of XLA's GpuTargetConfigProto. What differs:
_DIFFERING = {
    "h200": {
        "shared_memory_per_block_optin": 232448,
        "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "memory_bandwidth": 4800000000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 150000000000,
        "capability": "major: 9 minor: 0",
        "name": "NVIDIA H200",
    },
    "rtx4090": {
        "shared_memory_per_block_optin": 101376,
        "shared_memory_per_core": 102400,
        "threads_per_core_limit": 1536,
        "core_count": 128,
        "memory_bandwidth": 1008000000000,
        "l2_cache_size": 75497472,
        "clock_rate_ghz": 2.52,
        "device_memory_size": 25757220864,
        "capability": "major: 8 minor: 9",
        "name": "NVIDIA GeForce RTX 4090",
    },
}
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: %(shared_memory_per_block_optin)d
  shared_memory_per_core: %(shared_memory_per_core)d
  threads_per_core_limit: %(threads_per_core_limit)d
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: %(core_count)d
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: %(memory_bandwidth)d
  l2_cache_size: %(l2_cache_size)d
  clock_rate_ghz: %(clock_rate_ghz)g
  device_memory_size: %(device_memory_size)d
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  cuda_compute_capability { %(capability)s }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "%(name)s"
"""
#: Descriptions of GPUs by name, as XLA reads them.
GPU_TARGETS = {name: _TARGET % own for name, own in _DIFFERING.items()}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*-> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Instructions that launch nothing: they name, group or view what others have computed, or they
# are control flow, whose own computations are counted instead.
_NO_KERNEL = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
    + ("partition-id", "opt-barrier", "copy-done")
)
_CONTROL = frozenset(("while", "conditional", "call"))
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def gpu_device(target: str = "h200"):
    """A described GPU to compile for; needs the extra ``aot``, but no GPU.

    Raises:
      RuntimeError: the CUDA plugin is not installed (raised by JAX).
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=GPU_TARGETS[target], topology="1x1x1"
    )
    return topology.devices[0]


def described(arrays, device):
    """Shapes and types of a pytree of arrays, placed on a device that may not exist."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def computations(hlo: str) -> dict[str, list[str]]:
    """Instruction lines of optimised HLO text, by computation name."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = found.setdefault(header.group(1), [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def called(lines: Iterable[str]) -> set[str]:
    """Names of the computations that some instructions call."""
    names: set[str] = set()
    for line in lines:
        names.update(_CALLED.findall(line))
        for group in _BRANCHES.findall(line):
            names.update(name.strip().lstrip("%") for name in group.split(","))
    return names


def loop_bodies(hlo: str) -> dict[str, list[str]]:
    """Computations that run inside a ``while``: the bodies and all that they call."""
    every = computations(hlo)
    pending = {
        match.group(1)
        for lines in every.values()
        for line in lines
        for match in re.finditer(r" while\(.*body=%?([\w.\-]+)", line)
    }
    inside: dict[str, list[str]] = {}
    while pending:
        name = pending.pop()
        if name in every and name not in inside:
            inside[name] = every[name]
            pending |= called(every[name])
    return inside


def cache_sized_copies(hlo: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Instructions inside loops that write a whole buffer of one of some shapes anew.

    That is every ``copy``, and every fusion that has such a result without being an in-place
    ``dynamic-update-slice``.
    """
    every = computations(hlo)
    marks = [f"[{','.join(map(str, shape))}]" for shape in shapes]
    copies = []
    for lines in loop_bodies(hlo).values():
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None or not any(mark in match.group(3) for mark in marks):
                continue
            opcode = match.group(4)
            inner = [text for name in called([line]) for text in every.get(name, [])]
            in_place = any(" dynamic-update-slice(" in text for text in inner)
            if opcode in ("copy", "copy-start") or (opcode == "fusion" and not in_place):
                copies.append(line.strip())
    return copies


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Something that a program launches on the device.

    Attributes:
      name: of the instruction in the optimised HLO.
      opcode: ``fusion``, ``custom-call``, ``copy`` or another that XLA left unfused.
      scope: where it comes from in the Python program (JAX's name stack); for a fusion, where its
        result does. Empty where XLA made it up, as it does with copies.
    """

    name: str
    opcode: str
    scope: str


@dataclasses.dataclass(frozen=True)
class MainLoop:
    """A program's last outermost ``while`` loop.

    Attributes:
      name: of the instruction.
      kernels: what one trip launches: condition and body; loops inside them with condition and
        body once, however often they run; and both branches of conditionals, of which one runs.
      control: loops and conditionals inside, which are no kernels here (in a CUDA graph each is a
        node of its own).
    """

    name: str
    kernels: list[Kernel]
    control: int


def main_loop(hlo: str) -> MainLoop:
    """The last of the outermost loops: what stands before it, as prefill does, may launch more.

    Raises:
      ValueError: the program has no loop.
    """
    every, inside = computations(hlo), loop_bodies(hlo)
    loops = []
    for line in (line for name in every if name not in inside for line in every[name]):
        match = _INSTRUCTION.match(line)
        if match is not None and match.group(4) == "while":
            loops.append(MainLoop(match.group(2), *_launched(every, called([line]))))
    if not loops:
        raise ValueError("the program has no loop")
    return loops[-1]


def in_a_graph(log: str, name: str) -> bool:
    """Whether an instruction became part of a CUDA graph.

    Args:
      log: what XLA writes with ``TF_CPP_VMODULE=command_buffer_conversion_pass=2``.
      name: of the instruction.
    """
    graphs = re.findall(r"Creating command buffer thunk with the following thunks: (.*)", log)
    return any(name in graph.split(", ") for graph in graphs)


def _launched(every: dict[str, list[str]], names: Iterable[str]) -> tuple[list[Kernel], int]:
    kernels, control = [], 0
    for line in (line for name in sorted(names) for line in every[name]):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        opcode = match.group(4)
        if opcode in _CONTROL:
            inner, deeper = _launched(every, called([line]))
            kernels += inner
            control += deeper + (opcode != "call")
        elif opcode not in _NO_KERNEL:
            scope = _OP_NAME.search(line)
            kernels.append(Kernel(match.group(2), opcode, scope.group(1) if scope else ""))
    return kernels, control
