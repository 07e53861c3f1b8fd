"""Settings every test runs under: the CPU unless told otherwise, and strict promotion."""

import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is first imported
# What tests compile or tune is no business of the user's; other processes they start share it.
_cache = tempfile.TemporaryDirectory(prefix="ssd_jax-tests-")
os.environ["SSD_JAX_CACHE"] = _cache.name

# Most of the suite's time is XLA compiling toys that then run for milliseconds. These two cost
# speed, not meaning; .ci/run does without them once, to run what users run. XLA ends the process
# on an option that it does not know, as jax 0.11's does not know this one.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Two test files at a time leave torch's threads one core; more of them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from ssd_jax import batch, memory  # noqa: E402

# Mixing bfloat16 and float32 by accident is an error. Rank promotion stays allowed: adding a
# bias [E] to [B, T, E] is the idiom of every linear layer.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Thousands of programs in one process are more memory mappings than it may have."""
    yield
    if memory.mappings() > 0.25:
        batch._programs.clear()
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """What tests say they tried (``record_property("tried", ...)``), from all workers."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "tried":
                terminalreporter.write_line(f"tried: {value}")
