"""XLA options that make the whole decode one CUDA graph.

By default a ``while_loop`` returns to the host after every round. As one graph it does not; XLA
reads the options that ask for it from the environment, once, when its first backend starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

ONE_GRAPH = (
    "--xla_gpu_enable_command_buffer=+WHILE",
    # Without this, what surrounds the loop is too short a sequence to become a graph.
    "--xla_gpu_graph_min_graph_size=1",
)
# XLA aborts the process on an option that it does not know, so only versions that were tried.
_KNOWN_TO = ("0.10", "0.11")
_SWITCH = "SSD_JAX_CUDA_GRAPH"
_CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def ask_for_one_graph(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Put :data:`ONE_GRAPH` into ``XLA_FLAGS`` where that helps and is safe.

    That is: an NVIDIA GPU and JAX's plugin for it are here, ``JAX_PLATFORMS`` does not rule them
    out, this jaxlib knows the options, ``XLA_FLAGS`` mentions neither of them yet, and
    ``SSD_JAX_CUDA_GRAPH`` is not 0. Has no effect once JAX has started a backend.

    Returns:
      Whether ``XLA_FLAGS`` was changed.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    wanted = environ.get(_SWITCH, "1") != "0"
    allowed = not platforms or any(name in platforms for name in ("cuda", "gpu"))
    if not (wanted and allowed and known() and _has_gpu()):
        return False
    return add(environ)


def add(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Append :data:`ONE_GRAPH` to ``XLA_FLAGS`` unless it mentions one of them already."""
    given = environ.get("XLA_FLAGS", "")
    if any(flag.split("=")[0] in given for flag in ONE_GRAPH):
        return False
    environ["XLA_FLAGS"] = " ".join((given, *ONE_GRAPH)).strip()
    return True


def known() -> bool:
    """Whether the installed jaxlib is of a version that is known to have the options."""
    version = importlib.metadata.version("jaxlib")
    return version.rpartition(".")[0] in _KNOWN_TO


def _has_gpu() -> bool:
    if not Path("/dev/nvidiactl").exists():
        return False
    try:
        return any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS)
    except ModuleNotFoundError:  # no plugins at all
        return False
