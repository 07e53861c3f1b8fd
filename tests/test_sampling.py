"""The choice of a token: noise, warpers, and the distribution they produce."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.errors import SamplingError
from ssd_jax.sampling import (
    Draw,
    Noise,
    Sampling,
    best_few,
    best_two,
    choose,
    gumbel_noise,
    scores,
    threefry2x32,
    warp,
)

VOCAB = 37


def draw_of(batch=1, **options) -> Draw:
    draw = Sampling.create(batch, **options).draw
    assert draw is not None
    return draw


def noise_at(draw, positions, vocab=VOCAB) -> Noise:
    """The noise of some positions, as entries in their order."""
    values = gumbel_noise(draw, jnp.asarray(positions), vocab)
    return Noise(values, jnp.zeros(values.shape[0], jnp.int32))


def pick(logits, noise, entry, draw):
    return jax.jit(choose)(logits, noise, jnp.asarray(entry), draw)


def test_threefry_is_jax_threefry():
    from jax.extend.random import threefry2x32_p

    rng = np.random.default_rng(0)
    words = [jnp.asarray(rng.integers(0, 2**32, 1000, dtype=np.uint32)) for _ in range(4)]
    ours = threefry2x32((words[0], words[1]), (words[2], words[3]))
    theirs = threefry2x32_p.bind(*words)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_depends_on_seed_position_and_token_alone():
    sampling = draw_of(2, temperature=1.0, seed=[5, 2**40 + 1])
    positions = jnp.asarray([[3, 4, 9], [9, 3, 0]])
    noise = gumbel_noise(sampling, positions, VOCAB)
    wider = gumbel_noise(sampling, positions, VOCAB + 11)
    np.testing.assert_array_equal(noise, wider[:, :, :VOCAB])
    for row, seed in enumerate([5, 2**40 + 1]):
        for column, position in enumerate(np.asarray(positions[row])):
            expected = reference.gumbel(seed, int(position), VOCAB)
            np.testing.assert_allclose(noise[row, column], expected, atol=2e-4)


def test_noise_is_standard_gumbel():
    sampling = draw_of(temperature=1.0, seed=1)
    noise = np.asarray(gumbel_noise(sampling, jnp.arange(400)[None], 500)).ravel()
    assert np.isfinite(noise).all()
    # Mean 0.5772 and variance 1.6449; five standard errors of 200,000 draws.
    assert abs(noise.mean() - 0.57722) < 5 * 1.2825 / len(noise) ** 0.5
    assert abs(noise.var() - np.pi**2 / 6) < 5 * 2.1 * 1.645 / len(noise) ** 0.5
    assert noise.max() > 10.0


def test_noise_is_drawn_once_for_each_position():
    """Rows move on at their own pace and keep what they have."""
    draw = draw_of(3, temperature=[1.0, 0.0, 0.5], seed=[3, 4, 5])
    noise = Noise.undrawn(3, 4, VOCAB)
    further = jax.jit(Noise.drawn)
    for first in ([2, 7, 0], [3, 8, 4], [3, 9, 7], [12, 9, 7]):
        noise = further(noise, draw, jnp.asarray(first))
        positions = np.asarray(first)[:, None] + np.arange(4)
        expected = np.asarray(gumbel_noise(draw, jnp.asarray(positions), VOCAB))
        for row in (0, 2):
            for found in (noise, noise._draw_all(draw, jnp.asarray(first))):
                got = found.values[row, positions[row] % 4]
                # To the last bit but one: XLA rounds logarithms by the shape they are taken in.
                np.testing.assert_allclose(
                    got, expected[row], 1e-6, 1e-6, err_msg=f"{first}, {row}"
                )
    greedy = draw_of(temperature=0.0, min_new_tokens=1)
    nothing = Noise.undrawn(1, 4, VOCAB)
    np.testing.assert_array_equal(further(nothing, greedy, jnp.asarray([9])).values, 0)


def test_greedy_rows_have_no_noise_and_no_warp():
    logits = jax.random.normal(jax.random.key(0), (2, 3, VOCAB))
    draw = draw_of(2, temperature=[0.0, 1.0], top_k=[2, None], min_p=[0.9, None], seed=[1, 1])
    noise = noise_at(draw, [[0], [0]])
    scored = scores(logits, noise, jnp.zeros((2, 3), jnp.int32), draw)
    np.testing.assert_array_equal(scored[0], logits[0])
    np.testing.assert_array_equal(scored[1], logits[1] + noise.values[1])


def test_what_no_row_uses_is_not_in_the_program():
    greedy = Sampling.create(3, top_k=5, typical_p=0.5)
    assert jax.tree.leaves(greedy) == []
    sampled = Sampling.create(3, temperature=[0.0, 1.0, 2.0], min_p=0.1, typical_p=[0.5, None, 1])
    assert sampled.draw is not None
    assert sampled.draw.typical_p is None and sampled.processors is None
    # The third and last kind, whatever it is that asks for it.
    kinds = [dict(repetition_penalty=1.1), dict(temperature=1.0, typical_p=0.9)]
    kinds += [dict(bad_words_ids=[[3]]), dict(temperature=0.5, logit_bias={1: 2.0})]
    assert len({jax.tree.structure(Sampling.create(2, **options)) for options in kinds}) == 1


def assert_warped(got, expected, boundary=lambda: np.inf):
    """Equal, but for tokens too improbable to be drawn, and one at a boundary within rounding."""
    possible = np.asarray(expected)[expected > -np.inf].max() - 30 < got
    kept, wanted = np.isfinite(got) & possible, np.isfinite(expected) & possible
    if not np.array_equal(kept, wanted):
        assert np.sum(kept != wanted) == 1 and boundary() < 1e-5
    both = kept & wanted
    np.testing.assert_allclose(got[both], expected[both], rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.05, 4.0),
    st.one_of(st.none(), st.integers(1, VOCAB + 5)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_warp_equals_the_sorting_definition(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 3, (1, 4, VOCAB)).astype(np.float32)
    draw = draw_of(temperature=temperature, top_k=top_k, top_p=top_p)
    got = np.asarray(jax.jit(warp)(jnp.asarray(logits), draw))[0]
    for row in range(4):
        expected = reference.warp(logits[0, row], temperature, top_k, top_p)
        distance = partial(_boundary_distance, logits[0, row], temperature, top_k, top_p)
        assert_warped(got[row], expected, distance)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([3, 127, 400, 2_000]),
    st.one_of(st.none(), st.integers(1, 500)),
    st.floats(0.1, 30.0),
)
def test_a_rough_top_k_keeps_the_best_and_about_as_many(seed, vocab, top_k, spread):
    logits = np.random.default_rng(seed).normal(0, spread, (1, 3, vocab)).astype(np.float32)
    draw = draw_of(temperature=1.0, top_k=top_k)
    kept = np.isfinite(warp(jnp.asarray(logits), draw, rough=True))
    dropped = np.where(kept, -np.inf, logits).max(axis=-1)
    assert (np.where(kept, logits, np.inf).min(axis=-1) >= dropped).all()
    number = kept.sum(axis=-1)
    if top_k is None or top_k >= vocab:
        assert (number == vocab).all()
    elif top_k <= 250:  # far beyond the groups, chance has more of a say
        assert (np.abs(number - top_k) <= 0.5 * top_k + 3).all()
        if vocab <= 128:
            assert (number == top_k).all()
    else:
        assert (number >= top_k / 2).all()


def test_a_rough_top_k_keeps_what_ties_and_nothing_that_is_excluded():
    logits = np.full((1, 3, 1_000), -np.inf, np.float32)
    logits[0, 0, :200], logits[0, 1, 500:503] = 1.0, [3.0, 2.0, 1.0]
    logits[0, 2] = 5.0
    kept = np.isfinite(warp(jnp.asarray(logits), draw_of(temperature=1.0, top_k=50), rough=True))
    np.testing.assert_array_equal(kept.sum(axis=-1), [[200, 3, 1_000]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.999))
def test_a_rough_top_p_keeps_a_little_more_and_never_less(seed, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, (1, 1, 400)).astype(np.float32)
    draw = draw_of(temperature=1.0, top_p=top_p)
    kept = np.isfinite(warp(jnp.asarray(logits), draw, rough=True))
    assert (kept >= np.isfinite(warp(jnp.asarray(logits), draw))).all()
    weight = np.exp(logits)
    needed = reference.warp(logits[0, 0], 1.0, None, top_p)
    last = np.exp(needed[np.isfinite(needed)].min())  # the share may end within a token
    spare = weight.sum() * (1 - top_p)
    assert weight[~kept].sum() >= (1 - 0.3) * spare - last - 1e-3


def _boundary_distance(logits, temperature, top_k, top_p) -> float:
    scaled = reference.warp(logits, temperature, top_k, None)
    probs = np.sort(np.exp(scaled - scaled.max()))[::-1]
    return np.abs(np.cumsum(probs / probs.sum()) - (top_p or 0)).min()


WARPERS = {
    "TopK": [dict(top_k=1), dict(top_k=10), dict(top_k=10**6)],
    "TopP": [dict(top_p=0.05), dict(top_p=0.9), dict(top_p=0.999)],
    "MinP": [dict(min_p=0.0), dict(min_p=0.1), dict(min_p=1.0)],
    "Typical": [dict(mass=0.05), dict(mass=0.6), dict(mass=0.99)],
}


@pytest.mark.parametrize("vocab", [1, 2, 200])
def test_warpers_equal_transformers(vocab):
    """Each of them, and all in a row, on logits with ties and excluded tokens."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 2, (6, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, vocab // 2 :] = -np.inf if vocab > 1 else logits[2, 0]
    logits[3] *= 30
    chains = [[(kind, own)] for kind, options in WARPERS.items() for own in options]
    chains += [[(kind, rng.choice(own)) for kind, own in WARPERS.items()] for _ in range(12)]
    for chain in chains:
        temperature = float(rng.choice([0.7, 1.0, 1.6]))
        scaled = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        options = {}
        for kind, own in chain:
            if kind == "TopP" and _tied(scaled):
                continue  # a boundary among ties is torch's sort to decide
            scaled = getattr(hf, f"{kind}LogitsWarper")(**own)(None, scaled)
            options |= {"typical_p" if name == "mass" else name: x for name, x in own.items()}
        draw = draw_of(temperature=temperature, **options)
        got = np.asarray(jax.jit(warp)(jnp.asarray(logits)[None], draw))[0]
        for row in range(len(logits)):
            assert_warped(got[row], scaled[row].numpy())


def _tied(scaled) -> bool:
    rows = [row[np.isfinite(row)] for row in scaled.numpy()]
    return any(len(np.unique(row)) < len(row) for row in rows)


def test_top_k_keeps_ties_with_the_last_token():
    logits = jnp.asarray([[[3.0, 1.0, 2.0, 2.0, 0.0]]])
    kept = jnp.isfinite(warp(logits, draw_of(temperature=1.0, top_k=2)))
    assert kept[0, 0].tolist() == [True, False, True, True, False]


def test_choice_follows_the_warped_distribution():
    """Chi-square over 20,000 positions, significance 1e-4."""
    logits = np.random.default_rng(5).normal(0, 1.5, 8).astype(np.float32)
    for temperature, top_k, top_p in [(1.0, None, None), (0.7, 5, None), (1.4, 6, 0.8)]:
        draw = draw_of(temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
        count = 20_000
        rows = jnp.broadcast_to(jnp.asarray(logits), (1, count, 8))
        entry = jnp.arange(count)[None]
        token, _ = pick(rows, noise_at(draw, entry, 8), entry, draw)
        seen = np.bincount(np.asarray(token)[0], minlength=8)
        log_weights = reference.warp(logits, temperature, top_k, top_p)
        expected = np.exp(log_weights - log_weights.max())
        expected *= count / expected.sum()
        assert (seen[expected == 0] == 0).all()
        live = expected > 0
        statistic = np.sum((seen[live] - expected[live]) ** 2 / expected[live])
        # 0.9999 quantiles of chi-square for 7, 4 and (3 or fewer) degrees of freedom.
        assert statistic < {7: 29.9, 4: 23.5}.get(live.sum() - 1, 21.2)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.sampled_from([None, 1, 3, 30]),
    st.sampled_from([None, 0.2, 0.9]),
    st.sampled_from([None, 0.05, 0.5]),
    st.sampled_from([None, 0.2, 0.8]),
    st.booleans(),
)
def test_choice_is_the_best_score(seed, temperature, top_k, top_p, min_p, typical_p, tied):
    """Also where many of the best tokens are excluded, and where logits are equal."""
    logits = np.random.default_rng(seed).normal(0, 2, (2, 5, VOCAB)).astype(np.float32)
    logits = jnp.asarray(np.round(logits) if tied else logits)
    options = dict(top_k=[top_k, 2], top_p=[top_p, None], min_p=[min_p, None])
    draw = draw_of(2, temperature=[temperature, 1.0], typical_p=typical_p, seed=seed, **options)
    entry = jnp.asarray([[0, 1, 1, 2, 0]] * 2)
    noise = noise_at(draw, [[4, 5, 6]] * 2)
    token, margin = pick(logits, noise, entry, draw)
    scored = np.asarray(jax.jit(scores)(logits, noise, entry, draw))
    ranked = np.sort(scored, axis=-1)
    np.testing.assert_array_equal(token, scored.argmax(-1))
    # Tokens that were never tried may count as rivals though they are excluded.
    assert (np.asarray(margin) <= ranked[..., -1] - ranked[..., -2] + 1e-5).all()
    assert (np.asarray(margin) >= 0).all()


def test_a_choice_is_made_of_any_logits():
    """A flat distribution of which little is kept takes few trials; NaN does not hang, nor does
    what leaves no token at all."""
    for options in (dict(top_k=2), dict(top_k=2, top_p=0.9, min_p=0.1), dict(top_k=2, typical_p=1)):
        draw = draw_of(temperature=1.0, seed=3, **options)
        flat = jax.random.normal(jax.random.key(1), (1, 1, 5000)) * 1e-3
        broken = flat.at[0, 0, 7].set(jnp.nan)
        logits = jnp.concatenate([flat, broken, jnp.full_like(flat, -jnp.inf)], axis=1)
        token, _ = pick(logits, noise_at(draw, [[0, 1, 2]], 5000), [[0, 1, 2]], draw)
        assert int(token[0, 0]) in np.argsort(np.asarray(flat[0, 0]))[-2:]
        assert 0 <= int(token[0, 1]) < 5000 and int(token[0, 2]) == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e9, 1e30])
def test_the_scale_of_logits_does_not_matter_to_top_k(scale):
    logits = jnp.asarray(np.random.default_rng(2).permutation(64).astype(np.float32) * scale)
    draw = draw_of(temperature=1.0, top_k=2, seed=1)
    entry = jnp.arange(50)[None]
    rows = jnp.broadcast_to(logits, (1, 50, 64))
    token, _ = pick(rows, noise_at(draw, entry, 64), entry, draw)
    assert set(np.asarray(token)[0].tolist()) <= set(np.argsort(np.asarray(logits))[-2:].tolist())


@pytest.mark.parametrize("vocab", [3, 1000])
def test_margin_is_best_minus_second(vocab):
    rows = jnp.full((1, 2, vocab), -jnp.inf)
    rows = rows.at[0, 0, :3].set(jnp.asarray([1.0, 4.0, 2.5])).at[0, 1, 0].set(0.0)
    token, margin = best_two(rows)
    assert token.tolist() == [[1, 0]]
    assert margin.tolist() == [[1.5, np.inf]]


def test_the_only_token_wins_by_any_margin():
    token, margin = best_two(jnp.asarray([[[7.0]], [[2.0]]]))
    assert token.tolist() == [[0], [0]] and margin.tolist() == [[np.inf], [np.inf]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 5, 511, 512, 1024, 1025, 1500]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 4, 10**6]),
    st.floats(0.0, 1.0),
)
def test_the_best_few_are_those_of_a_sort(seed, vocab, count, values, impossible):
    """Of equals the first, also where blocks tie, and where most entries are minus infinity."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, values, (2, 3, vocab)).astype(np.float32)
    rows[rng.random(rows.shape) < impossible] = -np.inf
    count = min(count, vocab)
    expected = np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    best, token = jax.jit(best_few, static_argnums=1)(jnp.asarray(rows), count)
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(rows, expected, -1))


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
        {"top_p": "0.5"},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"typical_p": 0.0},
        {"typical_p": 1.1},
        {"typical_p": [0.5, 0.5]},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 0.5},
        {"seed": [1, 2]},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SamplingError):
        Sampling.create(1, **options)
