"""A short text does not pay for a long buffer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode
import toys

from ssd_jax import decode as engine
from ssd_jax import spans
from ssd_jax.benchmark.by_length import lengths, rounds_by_length
from ssd_jax.plan import Capacities, Plan, Policy

TEXT = 96  # the other tests' programs have other capacities, and other spans
SHORTEST = 32


def test_the_least_span_that_fits_is_looked_at():
    assert spans.spans(511) == [511]
    assert spans.spans(512) == [256, 512]
    assert spans.spans(1057) == [256, 512, 1057]
    assert spans.spans(128, finely=True) == [128]
    assert spans.spans(416, finely=True) == [128, 256, 416]

    def looked_at(size, **options):
        return jax.jit(lambda end: spans.within(end, size, jnp.int32, **options))

    for end, span in ((0, 256), (256, 256), (257, 512), (512, 512), (513, 1057), (1057, 1057)):
        assert looked_at(1057)(end) == span
    assert looked_at(300)(1) == 300 and looked_at(300, branch=True)(1) == 150


@pytest.mark.parametrize("plan", [Plan.baseline(), test_decode.plan_for(1)], ids=["plain", "tree"])
def test_decoding_looks_at_no_slot_far_behind_the_text(monkeypatch, plan):
    """What is there is not a number, which even a weight of zero would carry into every score."""
    monkeypatch.setattr(spans, "_SHORTEST", SHORTEST)
    stack, prompt = toys.stack("between"), [1, 2, 3]
    capacities = Capacities.of(plan, TEXT)
    sampling = test_decode.sampling_for("top_k", 1)
    _, (expected,) = test_decode.run(stack, [prompt], 55, sampling, Plan.baseline())

    def decode(until, first_spoilt):
        models, state = test_decode.start(stack, [prompt], 55, capacities)

        def spoilt(cache):
            late = slice(first_spoilt, None)
            keys, values = (
                tuple(x.at[(*(slice(None),) * axis, late)].set(jnp.nan) for x in group)
                for group, axis in zip((cache.keys, cache.values), cache.slot_axes, strict=True)
            )
            return dataclasses.replace(cache, keys=keys, values=values)

        caches = tuple(map(spoilt, state.caches))
        state = dataclasses.replace(state, caches=caches)
        tables, until = stack.tables, jnp.full_like(state.limit, until)
        state = engine.decode(
            models, tables, state, sampling, Policy.of(plan), until, capacities=capacities
        )
        return state, test_decode.continuations(state, [prompt])[0]

    state, tokens = decode(20, 2 * SHORTEST)
    assert len(tokens) >= 17 and tokens == expected[: len(tokens)]
    for cache in state.caches:
        for buffer in toys.by_slot(cache):
            assert np.isnan(buffer[:, 2 * SHORTEST :]).all()  # nothing is written there either
    # Across two spans the text is the same; where the slots do count, they spoil it.
    assert decode(58, 1000)[1] == expected
    assert decode(58, 2 * SHORTEST - 16)[1] != expected


def test_rounds_are_timed_in_both_buffers():
    assert lengths(1024) == [128, 192, 256, 384, 512, 768, 1024]
    assert lengths(96) == [96]
    plans = {"baseline": Plan.baseline()}
    rows = rounds_by_length(toys.stack(), plans, texts=(48, 96), repeats=1, say=lambda _: None)
    assert [(row.pop("mode"), row.pop("text")) for row in rows] == [
        ("baseline", 48),
        ("baseline", 96),
    ]
    assert all(len(row) == 4 and min(row.values()) > 0 for row in rows)
