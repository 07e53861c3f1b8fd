"""Settings every test runs under: the CPU unless told otherwise, and strict promotion."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is first imported
# Plans that a developer has tuned are none of the tests' business.
os.environ["SSD_JAX_CACHE"] = tempfile.mkdtemp(prefix="ssd-jax-tests-")

import jax  # noqa: E402

# Mixing bfloat16 and float32 by accident is an error. Rank promotion stays allowed: adding a
# bias [E] to [B, T, E] is the idiom of every linear layer.
jax.config.update("jax_numpy_dtype_promotion", "strict")
