"""On a real GPU: run with ``JAX_PLATFORMS=cuda python -m pytest -m gpu``."""

import jax
import pytest
from prompts import TRIO, heldout

import ssd_jax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU"),
    pytest.mark.skipif(not TRIO.is_dir(), reason=f"{TRIO.name} is not shipped here"),
]


def test_models_load_in_bfloat16_by_default():
    assert ssd_jax.load(TRIO).oracle.dtype == "bfloat16"


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, top_k=50)])
def test_float32_is_lossless(sampling):
    stack = ssd_jax.load(TRIO, dtype="float32")
    for seed, prompt in enumerate(heldout(6)):
        options = dict(max_new_tokens=96, seed=seed, **sampling)
        expected = ssd_jax.generate(stack, prompt, mode="baseline", **options)
        for mode in ("speculative", "staged"):
            assert ssd_jax.generate(stack, prompt, mode=mode, **options).tokens == expected.tokens
