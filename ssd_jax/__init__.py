"""Staged speculative decoding for GPT-2 in pure JAX (Spector and Ré, arXiv 2308.04623).

Array axes, in every signature and docstring of this package:

  B  batch rows            T  tokens of one forward pass   S  cache slots
  N  tree nodes            W  nodes selected for a pass    C  candidate children
  X  candidates of a node  K  trunk nodes                  P  nodes of an accepted path
  D  deepest tree level    Z  scratch slots of a cache     Q  positions decided at once
  H  heads                 I  size of a head               E  model width
  L  layers                M  models, oracle first         V  vocabulary
  F  end-of-text ids       R  rounds on record             S' slots of the text buffer
"""

from ssd_jax import xla_flags as _xla_flags
from ssd_jax.errors import SsdError as SsdError
from ssd_jax.generate import GenerationResult as GenerationResult
from ssd_jax.generate import Stats as Stats

# `import ssd_jax.generate` would bind this name to the module; importing the function last
# leaves the function there, and `from ssd_jax.generate import generate` works all the same.
from ssd_jax.generate import generate as generate
from ssd_jax.plan import Plan as Plan
from ssd_jax.stack import Stack as Stack
from ssd_jax.stack import load as load

# XLA reads its options once, when the first backend starts, which no import does.
_xla_flags.ask_for_one_graph()
