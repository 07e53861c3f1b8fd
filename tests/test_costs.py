"""Costs of passes."""

import toys

from ssd_jax.costs import pass_seconds


def test_passes_are_timed_for_every_model_and_width():
    model = toys.model()
    passes = [(model, 1), (model, 5), (toys.model(layers=1), 1)]
    seconds = pass_seconds(passes, slots=16, loops=2, repeats=3)
    assert len(seconds) == 3 and min(seconds) > 0
