"""Costs of passes."""

import jax.numpy as jnp
import toys

from ssd_jax.costs import pass_seconds, roofline


def test_passes_are_timed_for_every_model_and_width():
    model = toys.model()
    passes = [(model, 1), (model, 5), (toys.model(layers=1), 1)]
    for logits in (True, False):
        seconds = pass_seconds(passes, slots=16, repeats=3, loop_seconds=1e-3, logits=logits)
        assert len(seconds) == 3 and min(seconds) > 0


def test_a_roofline_is_bytes_and_operations_a_second():
    bandwidth, flops = roofline(jnp.dtype("float32"), size=256, repeats=2)
    assert bandwidth > 1e6 and flops > 1e6
