"""A short form of ``python tests/soak.py``."""

from soak import soak

import ssd_jax


def test_mixed_requests_leave_memory_flat_compile_nothing_and_change_no_text():
    verdict = soak(ssd_jax.load("python-tiny"), 1, requests=30)
    assert verdict.requests == 30 and verdict.tokens > 1000
    assert not verdict.different and not verdict.compiled
    assert verdict.sound, verdict
