"""Staged speculative decoding for GPT-2 in pure JAX (Spector and Ré, arXiv 2308.04623).

Array axes, in every signature and docstring of this package::

  B  batch rows            T  tokens of one forward pass   S  cache slots
  N  tree nodes            W  nodes selected for a pass    C  candidate children
  X  candidates of a node  K  trunk nodes                  P  nodes of an accepted path
  D  deepest tree level    Z  scratch slots of a cache     Q  positions decided at once
  H  heads                 I  size of a head               E  model width
  L  layers                M  models, oracle first         V  vocabulary
  F  end-of-text ids       R  rounds on record             S' slots of the text buffer
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ssd_jax import xla_flags as _xla_flags

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult as GenerationResult
    from ssd_jax.batch import Stats as Stats
    from ssd_jax.errors import SsdError as SsdError
    from ssd_jax.generate import Stream as Stream
    from ssd_jax.generate import generate as generate
    from ssd_jax.generate import stream as stream
    from ssd_jax.generation_config import GenerationConfig as GenerationConfig
    from ssd_jax.plan import Plan as Plan
    from ssd_jax.session import Session as Session
    from ssd_jax.stack import Stack as Stack
    from ssd_jax.stack import load as load
    from ssd_jax.tuning.tuner import tune as tune
    from ssd_jax.verification import verify_lossless as verify_lossless

__version__ = "0.1.0"

_MODULES = {
    "GenerationConfig": "generation_config",
    "GenerationResult": "batch",
    "Session": "session",
    "SsdError": "errors",
    "Stats": "batch",
    "Stream": "generate",
    "generate": "generate",
    "stream": "generate",
    "Plan": "plan",
    "Stack": "stack",
    "load": "stack",
    "tune": "tuning.tuner",
    "verify_lossless": "verification",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: a command line's ``--help`` does without JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _Package(types.ModuleType):
    """A package in which ``generate`` is the function, whoever imports the module and when."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule in its package once it is imported.
        if name == "generate" and isinstance(value, types.ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# XLA reads its options once, when the first backend starts, which no import does.
_xla_flags.ask_for_one_graph()
