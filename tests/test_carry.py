"""The loop that carries its small arrays as one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax.carry import while_loop


def test_it_is_the_loop_of_jax_to_the_bit():
    """Signed zeros, infinities and NaNs with a payload among what is carried."""
    odd = np.array([-0.0, np.inf, -np.inf, 1e-42, 0.0], np.float32)
    odd[4:] = np.array([0x7FC00123], np.uint32).view(np.float32)
    init = {
        "odd": jnp.asarray(odd),
        "count": jnp.int32(0),
        "seed": jnp.array([[2**32 - 1], [7]], jnp.uint32),
        "large": jnp.arange(100, dtype=jnp.float32),
        "flag": jnp.array([True, False]),
        "half": jnp.ones((2, 3), jnp.bfloat16),
        "none": None,
        "empty": jnp.zeros((0, 4)),
    }

    def cond(carry):
        return carry["count"] < 5

    def body(carry):
        return {
            **carry,
            "odd": carry["odd"][jnp.array([1, 2, 3, 4, 0])],
            "count": carry["count"] + 1,
            "seed": carry["seed"] * jnp.uint32(5),
            "large": carry["large"] * 1.5,
            "flag": ~carry["flag"],
            "half": carry["half"] + carry["count"].astype(jnp.bfloat16),
        }

    ours, theirs = (
        jax.jit(lambda init, loop=loop: loop(cond, body, init))(init)
        for loop in (while_loop, lax.while_loop)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_small_arrays_are_one():
    init = (jnp.int32(0), jnp.zeros(3), jnp.zeros((4, 8), jnp.uint32), jnp.zeros(33))

    def body(carry):
        return jax.tree.map(lambda x: x + 1, carry)

    closed = jax.make_jaxpr(lambda init: while_loop(lambda c: c[0] < 3, body, init))(init)
    (loop,) = (eqn for eqn in closed.eqns if eqn.primitive.name == "while")
    assert [v.aval.shape for v in loop.outvars] == [(36,), (33,)]


def test_nothing_small_is_no_matter():
    (out,) = while_loop(lambda c: c[0][0] < 3, lambda c: (c[0] + 1,), (jnp.zeros(40),))
    np.testing.assert_array_equal(out, np.full(40, 3.0))
