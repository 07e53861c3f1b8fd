"""Models made from other models' weights: fewer layers, and exact widening."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2


def layers_of(model: GPT2, layers: int) -> GPT2:
    """A float32 model of ``layers`` evenly spaced layers of ``model``, first and last among them.

    The usual start of a distilled model (Sanh et al., 2019).

    Raises:
      ConfigError: ``model`` has fewer layers.
    """
    depth = model.config.n_layer
    if not 1 <= layers <= depth:
        raise ConfigError(f"cannot take {layers} of {depth} layers; ask for 1 to {depth}")
    chosen = np.linspace(0, depth - 1, layers).round().astype(int)
    config = dataclasses.replace(model.config, n_layer=layers)
    small = GPT2(config, rngs=nnx.Rngs(0))
    taken = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    taken["h"] = {new: taken["h"][old] for new, old in enumerate(chosen.tolist())}
    state = nnx.state(small, nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda x: x.astype("float32"), taken))
    nnx.update(small, state)
    return small
