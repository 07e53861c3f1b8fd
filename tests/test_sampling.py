"""The choice of a token: noise, warpers, and the distribution they produce."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.errors import SamplingError
from ssd_jax.sampling import Sampling, best_two, choose, gumbel_noise, scores, threefry2x32, warp

VOCAB = 37


def test_threefry_is_jax_threefry():
    from jax.extend.random import threefry2x32_p

    rng = np.random.default_rng(0)
    words = [jnp.asarray(rng.integers(0, 2**32, 1000, dtype=np.uint32)) for _ in range(4)]
    ours = threefry2x32((words[0], words[1]), (words[2], words[3]))
    theirs = threefry2x32_p.bind(*words)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_depends_on_seed_position_and_token_alone():
    sampling = Sampling.create(2, temperature=1.0, seed=[5, 2**40 + 1])
    positions = jnp.asarray([[3, 4, 9], [9, 3, 0]])
    noise = gumbel_noise(sampling, positions, VOCAB)
    wider = gumbel_noise(sampling, positions, VOCAB + 11)
    np.testing.assert_array_equal(noise, wider[:, :, :VOCAB])
    for row, seed in enumerate([5, 2**40 + 1]):
        for column, position in enumerate(np.asarray(positions[row])):
            expected = reference.gumbel(seed, int(position), VOCAB)
            np.testing.assert_allclose(noise[row, column], expected, atol=2e-4)


def test_noise_is_standard_gumbel():
    sampling = Sampling.create(1, temperature=1.0, seed=1)
    noise = np.asarray(gumbel_noise(sampling, jnp.arange(400)[None], 500)).ravel()
    assert np.isfinite(noise).all()
    # Mean 0.5772 and variance 1.6449; five standard errors of 200,000 draws.
    assert abs(noise.mean() - 0.57722) < 5 * 1.2825 / len(noise) ** 0.5
    assert abs(noise.var() - np.pi**2 / 6) < 5 * 2.1 * 1.645 / len(noise) ** 0.5
    assert noise.max() > 10.0


def test_greedy_rows_have_no_noise_and_no_warp():
    logits = jax.random.normal(jax.random.key(0), (2, 3, VOCAB))
    sampling = Sampling.create(2, temperature=[0.0, 1.0], top_k=[2, None], seed=[1, 1])
    noise = gumbel_noise(sampling, jnp.zeros((2, 1), jnp.int32), VOCAB)
    scored = scores(logits, noise, jnp.zeros((2, 3), jnp.int32), sampling)
    np.testing.assert_array_equal(scored[0], logits[0])
    np.testing.assert_array_equal(scored[1], logits[1] + noise[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.05, 4.0),
    st.one_of(st.none(), st.integers(1, VOCAB + 5)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_warp_equals_the_sorting_definition(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 3, (1, 4, VOCAB)).astype(np.float32)
    sampling = Sampling.create(1, temperature=temperature, top_k=top_k, top_p=top_p)
    got = np.asarray(jax.jit(warp)(jnp.asarray(logits), sampling))[0]
    for row in range(4):
        expected = reference.warp(logits[0, row], temperature, top_k, top_p)
        kept, wanted = np.isfinite(got[row]), np.isfinite(expected)
        if not np.array_equal(kept, wanted):  # only a nucleus boundary within rounding may differ
            assert top_p is not None and np.sum(kept != wanted) == 1
            assert _boundary_distance(logits[0, row], temperature, top_k, top_p) < 1e-5
        both = kept & wanted
        np.testing.assert_allclose(got[row][both], expected[both], rtol=1e-5, atol=1e-5)


def _boundary_distance(logits, temperature, top_k, top_p) -> float:
    scaled = reference.warp(logits, temperature, top_k, None)
    probs = np.sort(np.exp(scaled - scaled.max()))[::-1]
    return np.abs(np.cumsum(probs / probs.sum()) - top_p).min()


def test_warp_equals_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(3).normal(0, 2, (5, 200)).astype(np.float32)
    for temperature, top_k, top_p in [(0.7, 10, None), (1.3, None, 0.9), (1.0, 50, 0.6)]:
        scaled = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        if top_k:
            scaled = hf.TopKLogitsWarper(top_k)(None, scaled)
        if top_p:
            scaled = hf.TopPLogitsWarper(top_p)(None, scaled)
        sampling = Sampling.create(1, temperature=temperature, top_k=top_k, top_p=top_p)
        np.testing.assert_allclose(warp(jnp.asarray(logits)[None], sampling)[0], scaled, rtol=1e-5)


def test_top_k_keeps_ties_with_the_last_token():
    logits = jnp.asarray([[[3.0, 1.0, 2.0, 2.0, 0.0]]])
    kept = jnp.isfinite(warp(logits, Sampling.create(1, temperature=1.0, top_k=2)))
    assert kept[0, 0].tolist() == [True, False, True, True, False]


def test_choice_follows_the_warped_distribution():
    """Chi-square over 20,000 positions, significance 1e-4."""
    logits = np.random.default_rng(5).normal(0, 1.5, 8).astype(np.float32)
    for temperature, top_k, top_p in [(1.0, None, None), (0.7, 5, None), (1.4, 6, 0.8)]:
        sampling = Sampling.create(1, temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
        count = 20_000
        noise = gumbel_noise(sampling, jnp.arange(count)[None], 8)
        rows = jnp.broadcast_to(jnp.asarray(logits), (1, count, 8))
        token, _ = choose(rows, noise, jnp.arange(count)[None], sampling)
        seen = np.bincount(np.asarray(token)[0], minlength=8)
        log_weights = reference.warp(logits, temperature, top_k, top_p)
        expected = np.exp(log_weights - log_weights.max())
        expected *= count / expected.sum()
        assert (seen[expected == 0] == 0).all()
        live = expected > 0
        statistic = np.sum((seen[live] - expected[live]) ** 2 / expected[live])
        # 0.9999 quantiles of chi-square for 7, 4 and (3 or fewer) degrees of freedom.
        assert statistic < {7: 29.9, 4: 23.5}.get(live.sum() - 1, 21.2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.sampled_from([None, 1, 3, 30]),
    st.sampled_from([None, 0.2, 0.9]),
    st.booleans(),
)
def test_choice_is_the_best_score(seed, temperature, top_k, top_p, tied):
    """Also where many of the best tokens are excluded, and where logits are equal."""
    logits = np.random.default_rng(seed).normal(0, 2, (2, 5, VOCAB)).astype(np.float32)
    logits = jnp.asarray(np.round(logits) if tied else logits)
    sampling = Sampling.create(
        2, temperature=[temperature, 1.0], top_k=[top_k, 2], top_p=[top_p, None], seed=seed
    )
    level = jnp.asarray([[0, 1, 1, 2, 0]] * 2)
    noise = gumbel_noise(sampling, jnp.asarray([[4, 5, 6]] * 2), VOCAB)
    token, margin = jax.jit(choose)(logits, noise, level, sampling)
    scored = np.asarray(jax.jit(scores)(logits, noise, level, sampling))
    ranked = np.sort(scored, axis=-1)
    np.testing.assert_array_equal(token, scored.argmax(-1))
    # Tokens that were never tried may count as rivals though they are excluded.
    assert (np.asarray(margin) <= ranked[..., -1] - ranked[..., -2] + 1e-5).all()
    assert (np.asarray(margin) >= 0).all()


def test_a_choice_is_made_of_any_logits():
    """A flat distribution of which little is kept takes few trials; NaN does not hang."""
    sampling = Sampling.create(1, temperature=1.0, top_k=2, seed=3)
    noise = gumbel_noise(sampling, jnp.arange(2)[None], 5000)
    flat = jax.random.normal(jax.random.key(1), (1, 1, 5000)) * 1e-3
    broken = flat.at[0, 0, 7].set(jnp.nan)
    logits = jnp.concatenate([flat, broken], axis=1)
    token, _ = jax.jit(choose)(logits, noise, jnp.asarray([[0, 1]]), sampling)
    assert int(token[0, 0]) in np.argsort(np.asarray(flat[0, 0]))[-2:]
    assert 0 <= int(token[0, 1]) < 5000


def test_margin_is_best_minus_second():
    token, margin = best_two(jnp.asarray([[[1.0, 4.0, 2.5], [0.0, -jnp.inf, -jnp.inf]]]))
    assert token.tolist() == [[1, 0]]
    assert margin.tolist() == [[1.5, np.inf]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-9},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 0.5},
        {"seed": [1, 2]},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SamplingError):
        Sampling.create(1, **options)
