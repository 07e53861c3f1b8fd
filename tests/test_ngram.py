"""The Katz trigram: the mathematics against a slow reference, tables against brute force."""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_katz import ReferenceKatz, counts_of

from ssd_jax.errors import CheckpointError, ConfigError, DataError
from ssd_jax.ngram import (
    KatzModel,
    counting,
    file,
    good_turing,
    katz_discounts,
    levels,
    runs,
    tables,
)


@st.composite
def corpora(draw):
    """Documents over a tiny vocabulary; some very repetitive, so that counts exceed 5."""
    vocab_size = draw(st.integers(1, 6))
    token = st.integers(0, vocab_size - 1)
    documents = draw(st.lists(st.lists(token, max_size=12), max_size=5))
    repeats = draw(st.lists(st.integers(1, 9), min_size=len(documents), max_size=len(documents)))
    return [d * n for d, n in zip(documents, repeats, strict=True)], vocab_size


def zipf_documents(seed, vocab_size, documents=6, length=300):
    """Random text in which the next token leans on the last one."""
    rng = np.random.default_rng(seed)
    step = rng.zipf(1.4, size=(documents, length)) % vocab_size
    return [np.cumsum(row) // 2 % vocab_size for row in step]


def contexts(vocab_size):
    """All (a, b), unknown tokens included."""
    return list(itertools.product(range(-1, vocab_size), repeat=2))


def known(a, b):
    """What a model may use of the context (a, b)."""
    return () if b < 0 else (b,) if a < 0 else (a, b)


def all_log_probs(model):
    """Float64 ``[(V + 1)**2, V]``."""
    return np.stack([model.log_probs(a, b) for a, b in contexts(model.vocab_size)])


# ---------------------------------------------------------------------------- discounts


PROSODY = """
1 120 2 40 3 24 4 13 5 15 6 5 7 11 8 2 9 2 10 1 12 3 14 2 15 1 16 1 17 3 19 1 20 3 21 2 23 3
24 3 25 3 26 2 27 2 28 1 31 2 32 2 33 1 34 2 36 2 41 3 43 1 45 3 46 1 47 1 50 1 71 1 84 1
101 1 105 1 121 1 124 1 146 1 162 1 193 1 199 1 224 1 226 1 254 1 257 1 339 1 421 1 456 1
481 1 483 1 1140 1 1256 1 1322 1 1530 1 2131 1 2395 1 6925 1 7846 1
"""


def test_good_turing_reproduces_gale_and_sampson():
    """Their "prosody" example: p_1 = 2.468e-05 and r* of one = 0.7628 after rescaling."""
    r, n = np.array(PROSODY.split(), int).reshape(-1, 2).T
    total = (r * n).sum()
    adjusted = good_turing(r, n, r[-1])[r - 1]
    scale = (1 - n[0] / total) / (n * adjusted).sum()
    assert total == 30902
    np.testing.assert_allclose(scale * adjusted[0], 2.468e-05, rtol=2e-4)
    np.testing.assert_allclose(scale * adjusted[0] * total, 0.7628, atol=5e-5)


def test_discounts_follow_katz_formula_by_hand():
    """n = 12, 4, 2, 1, 0.6, 0.3 million: r* = 2/3, 3/2, 2, 3, 3 and 6 n_6 / n_1 = 3/20.

    Katz: d_r = (r*/r - 3/20) / (1 - 3/20), so d = 31/51, 12/17, 31/51, 12/17, 9/17.
    """
    n = np.array([12, 4, 2, 1, 0.6, 0.3]) * 1e6
    expected = [31 / 51, 12 / 17, 31 / 51, 12 / 17, 9 / 17]
    np.testing.assert_allclose(katz_discounts(np.arange(1, 7), n), expected, rtol=1e-12)


def test_few_counts_take_the_line():
    """n_r = 64 / r^3 is a line of slope -3 (bent by Z at neither end): r* = r (1 + 1/r)^-2."""
    r = np.array([1, 2, 4])
    z = 64 / r**3  # n_r = Z_r times half the gap to the neighbours: 1, 3/2, 2
    adjusted = good_turing(r, z * np.array([1, 1.5, 2]), 5)
    every = np.arange(1, 6)
    np.testing.assert_allclose(adjusted[1:], (every * (1 + 1 / every) ** -2.0)[1:], rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(1, 40), st.integers(1, 10**6)))
def test_discounts_lie_in_the_unit_interval(n):
    r = np.array(sorted(n), int)
    discounts = katz_discounts(r, np.array([n[x] for x in sorted(n)], int))
    assert discounts.shape == (5,)
    assert np.all((discounts > 0) & (discounts <= 1))


# ------------------------------------------------------------------------ probabilities


@settings(max_examples=150, deadline=None)
@given(corpora(), st.integers(1, 3))
def test_every_context_equals_the_reference_and_sums_to_one(corpus, min_count):
    documents, vocab_size = corpus
    model = KatzModel.fit(documents, vocab_size, min_trigram_count=min_count)
    reference = ReferenceKatz(documents, vocab_size, min_count)
    for a, b in contexts(vocab_size):
        got = np.exp(model.log_probs(a, b))
        np.testing.assert_allclose(got, reference.distribution(known(a, b)), rtol=1e-11)
        assert abs(got.sum() - 1) < 1e-14


def test_longer_text_equals_the_reference():
    """Counts above and below 5 at every order, and Turing estimates among the discounts."""
    documents = zipf_documents(0, 12, documents=20)
    model, reference = KatzModel.fit(documents, 12), ReferenceKatz(documents, 12)
    for a, b in contexts(12):
        expected = reference.distribution(known(a, b))
        np.testing.assert_allclose(np.exp(model.log_probs(a, b)), expected, rtol=1e-11)


def test_small_model_by_hand():
    """One token 0 of V = 3. All counts are 1, so d_1 = 1/2: P(0) = 1/2, the rest shared."""
    model = KatzModel.fit([[0]], 3)
    np.testing.assert_allclose(np.exp(model.log_probs(-1, -1)), [1 / 2, 1 / 4, 1 / 4], rtol=1e-15)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_no_text_is_uniform(documents):
    log_probs = all_log_probs(KatzModel.fit(documents, 4))
    np.testing.assert_allclose(log_probs, np.log(1 / 4), rtol=1e-15)


def test_context_with_every_continuation_seen_keeps_its_mass():
    """After 0, the tokens 0 and 1 follow equally often and nothing is left to back off."""
    model = KatzModel.fit([[0, 0], [0, 1]], 2)
    np.testing.assert_allclose(np.exp(model.log_probs(-1, 0)), [0.5, 0.5], rtol=1e-15)


def test_documents_do_not_touch():
    """The pair 0, 1 only occurs across two documents, so P(1 | 0) is what unigrams say of 1."""
    model = KatzModel.fit([[2, 0], [1, 2]], 3)
    np.testing.assert_array_equal(model.log_probs(-1, 0), model.log_probs(-1, -1))
    np.testing.assert_array_equal(model.log_probs(2, 0), model.log_probs(-1, -1))


def test_sums_to_one_where_the_suffix_leaves_almost_nothing():
    """After 1 nearly always comes 0, so the back-off of (2, 1) divides by about 1e-5.

    Taking that mass as one minus the seen would lose five of sixteen digits.
    """
    documents = [[0, 1] * 100_000, [2, 1, 0], [2, 1, 0, 3], [1, 3], [4, 1, 3], [2, 3]]
    model = KatzModel.fit(documents, 5)
    assert np.exp(model.log_probs(-1, 1))[0] > 1 - 1e-4
    assert np.exp(model.log_probs(2, 1))[0] < 0.9
    np.testing.assert_allclose(np.exp(all_log_probs(model)).sum(axis=1), 1, atol=2e-15, rtol=0)


@settings(max_examples=40, deadline=None)
@given(corpora(), corpora())
def test_perplexity_equals_the_slow_one(corpus, other):
    documents, vocab_size = corpus
    held_out = [[t % vocab_size for t in d] for d in other[0]] + [[0]]
    expected = ReferenceKatz(documents, vocab_size).perplexity(held_out)
    got = KatzModel.fit(documents, vocab_size).perplexity(held_out)
    assert math.isclose(got, expected, rel_tol=1e-11)


# ------------------------------------------------------------------------------ pruning


def test_pruning_equals_fitting_with_the_cutoff_and_sums_to_one():
    documents = zipf_documents(1, 9)
    full = KatzModel.fit(documents, 9)
    pruned = full.prune(min_trigram_count=3)
    assert 0 < pruned.sizes[2] < full.sizes[2] and pruned.sizes[:2] == full.sizes[:2]
    log_probs = all_log_probs(pruned)
    fitted = KatzModel.fit(documents, 9, min_trigram_count=3)
    np.testing.assert_array_equal(all_log_probs(fitted), log_probs)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-14)
    again = full.prune(min_trigram_count=2).prune(min_trigram_count=3)
    np.testing.assert_array_equal(all_log_probs(again), log_probs)


def held(model):
    """The bigrams and trigrams of a model, as tuples."""
    size = model.vocab_size
    _, bigrams, trigrams = (level.order.ngrams.tolist() for level in model._levels)
    pairs = {(x // size, x % size) for x in bigrams}
    return pairs, {(x // size**2, x // size % size, x % size) for x in trigrams}


def ranked(documents, length):
    """``{n-gram: (count, share of its context)}``."""
    return {
        (*context, token): (count, count / sum(row.values()))
        for context, row in counts_of(documents, length).items()
        for token, count in row.items()
    }


def most_frequent(ranks, bound):
    """The ``bound`` n-grams to keep; of those that tie for the last places, the last ones."""
    return set(sorted(ranks, key=lambda x: (ranks[x], x))[max(0, len(ranks) - bound) :])


def test_max_trigrams_keeps_the_most_frequent():
    documents = zipf_documents(2, 9)
    full, ranks = KatzModel.fit(documents, 9), ranked(documents, 3)
    for bound in (0, 1, 17, 50, len(ranks) - 1, len(ranks), len(ranks) + 1):
        pruned = full.prune(max_trigrams=bound)
        assert held(pruned) == (held(full)[0], most_frequent(ranks, bound))
        assert pruned.sizes[2] == min(bound, len(ranks))
        np.testing.assert_allclose(np.exp(all_log_probs(pruned)).sum(axis=1), 1, rtol=1e-14)


def test_max_bigrams_drops_the_trigrams_that_end_in_them():
    documents = zipf_documents(2, 9)
    full, ranks, triples = KatzModel.fit(documents, 9), ranked(documents, 2), ranked(documents, 3)
    for bound in (0, 1, 20, len(ranks) - 1, len(ranks) + 1):
        pairs = most_frequent(ranks, bound)
        left = {x: rank for x, rank in triples.items() if x[1:] in pairs}
        assert held(full.prune(max_bigrams=bound)) == (pairs, set(left))
        both = full.prune(max_bigrams=bound, max_trigrams=30, min_trigram_count=2)
        left = {x: rank for x, rank in left.items() if rank[0] >= 2}
        assert held(both) == (pairs, most_frequent(left, 30))
        again = full.prune(max_bigrams=bound).prune(max_trigrams=30, min_trigram_count=2)
        np.testing.assert_array_equal(all_log_probs(again), all_log_probs(both))


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(0, 12), st.integers(0, 12))
def test_pruned_models_equal_the_reference_and_sum_to_one(corpus, max_bigrams, max_trigrams):
    documents, vocab_size = corpus
    model = KatzModel.fit(documents, vocab_size).prune(
        max_bigrams=max_bigrams, max_trigrams=max_trigrams
    )
    reference = ReferenceKatz(documents, vocab_size, kept=set.union(*held(model)))
    for a, b in contexts(vocab_size):
        got = np.exp(model.log_probs(a, b))
        np.testing.assert_allclose(got, reference.distribution(known(a, b)), rtol=1e-11)
        assert abs(got.sum() - 1) < 1e-14


# ------------------------------------------------------------------------ bounded memory


def assert_same_orders(model, other):
    for one, two in zip(model._levels, other._levels, strict=True):
        for field in dataclasses.fields(one.order):
            x, y = getattr(one.order, field.name), getattr(two.order, field.name)
            np.testing.assert_array_equal(x, y, err_msg=field.name)
            assert np.asarray(x).dtype == np.asarray(y).dtype, field.name


BOUND = st.none() | st.integers(0, 12)


@settings(max_examples=150, deadline=None)
@given(corpora(), st.integers(1, 4000), BOUND, st.integers(1, 3), BOUND)
def test_fit_in_little_memory_is_the_pruned_full_model(
    corpus, memory_bytes, max_bigrams, min_count, max_trigrams
):
    """From a run for every token, merged one n-gram at a time, to a single run."""
    documents, vocab_size = corpus
    limits = dict(max_bigrams=max_bigrams, min_trigram_count=min_count, max_trigrams=max_trigrams)
    pieces = (np.array(d, np.uint16) for d in documents)
    small = KatzModel.fit(pieces, vocab_size, memory_bytes=memory_bytes, **limits)
    full = KatzModel.fit(documents, vocab_size)
    assert_same_orders(small, full.prune(**limits))
    for rank, order in enumerate(level.order for level in full._levels):
        counts = ranked(documents, rank + 1)
        tuples = np.array(sorted(counts), np.int64).reshape(-1, rank + 1)
        keys = tuples @ vocab_size ** np.arange(rank, -1, -1)
        np.testing.assert_array_equal(order.ngrams, keys)
        np.testing.assert_array_equal(order.counts, [counts[x][0] for x in sorted(counts)])


@pytest.mark.parametrize("memory_bytes", [10_000, 60_000, 600_000])
def test_longer_text_in_little_memory(memory_bytes):
    documents = zipf_documents(8, 40, documents=20, length=800)
    limits = dict(max_bigrams=400, max_trigrams=1000)
    small = KatzModel.fit(documents, 40, memory_bytes=memory_bytes, **limits)
    assert_same_orders(small, KatzModel.fit(documents, 40).prune(**limits))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=200), st.integers(1, 50), st.integers(1, 30),
       st.integers(1, 12))  # fmt: skip
def test_runs_are_merged_in_blocks_of_whole_quotients(values, capacity, size, width):
    with contextlib.closing(runs.SortedRuns(capacity, None)) as counted:
        counted.add(np.array(values, np.int64))
        counted.finish()
        blocks = list(counted.blocks(size, width))
        for block, again in zip(blocks, counted.blocks(size, width), strict=True):
            np.testing.assert_array_equal(block, again)
    expected = collections.Counter(values)
    if blocks:
        merged, counts = map(np.concatenate, zip(*blocks, strict=True))
        assert merged.tolist() == sorted(expected)
        assert counts.tolist() == [expected[x] for x in sorted(expected)]
    else:
        assert not values
    quotients = [set((block // width).tolist()) for block, _ in blocks]
    assert sum(map(len, quotients)) == len(set().union(*quotients))
    number = max(1, -(-len(values) // capacity))
    assert all(0 < len(block) <= max(size, number) + number * width for block, _ in blocks)


def test_levels_in_blocks_are_the_same(monkeypatch):
    documents = zipf_documents(3, 30)
    whole = KatzModel.fit(documents, 30, min_trigram_count=2)
    monkeypatch.setattr(levels, "_BLOCK", 17)
    parts = KatzModel.fit(documents, 30, min_trigram_count=2)
    np.testing.assert_array_equal(all_log_probs(parts), all_log_probs(whole))


SPILLING = 2000  # bytes of memory that hold 35 tokens


def test_scratch_is_empty_afterwards_and_unused_by_short_texts(tmp_path):
    documents = zipf_documents(8, 9)

    def broken():
        yield from documents
        assert os.listdir(tmp_path) == [], "a file without a name"
        yield [9]

    KatzModel.fit(documents, 9, memory_bytes=SPILLING, scratch=tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match="outside 0 .. 8"):
        KatzModel.fit(broken(), 9, memory_bytes=SPILLING, scratch=tmp_path)
    assert os.listdir(tmp_path) == []
    KatzModel.fit(documents, 9, scratch=tmp_path / "absent")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_scratch_is_named_with_what_it_lacks(tmp_path, monkeypatch):
    full = lambda **_: open("/dev/full", "r+b", buffering=0)  # noqa: E731, SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DataError) as caught:
        KatzModel.fit(zipf_documents(8, 9), 9, memory_bytes=SPILLING, scratch=tmp_path)
    message = str(caught.value)
    assert re.search(r"cannot write \d+ bytes", message) and "\n" not in message
    assert str(tmp_path) in message and "No space left" in message and "memory_bytes" in message


def test_missing_scratch_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.*No such file"):
        KatzModel.fit(zipf_documents(8, 9), 9, memory_bytes=SPILLING, scratch=tmp_path / "absent")


def test_texts_whose_counts_may_overflow_are_refused(monkeypatch):
    monkeypatch.setattr(counting, "MAX_TOKENS", 10)
    KatzModel.fit([[0] * 4, [1] * 6], 2)
    with pytest.raises(DataError, match="more than 10 tokens"):
        KatzModel.fit([[0] * 4, [1] * 7], 2)


LARGE_FIT = """
import numpy as np
from ssd_jax.ngram import KatzModel

def megabytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def documents():
    rng = np.random.default_rng(0)
    for _ in range(1200):
        yield (rng.random(100_000) ** 3 * 8192).astype(np.uint16)

before = megabytes("VmRSS")
model = KatzModel.fit(
    documents(), 8192, max_bigrams=2_000_000, max_trigrams=2_000_000, memory_bytes=256 << 20
)
contexts = sum(len(level.order.keys) for level in model._levels)
print(before, megabytes("VmHWM"), sum(model.sizes), contexts)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_120_million_tokens_take_the_memory_stated():
    """Random text, nearly all of whose trigrams are distinct, as no real text's are."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE_FIT], capture_output=True, text=True, check=True
    )
    before, peak, ngrams, contexts = map(float, result.stdout.split())
    assert ngrams > 3_000_000
    assert peak - before < 256 + (25 * ngrams + 70 * contexts) / 2**20 + 32


# ------------------------------------------------------------------------------ hit rates


@settings(max_examples=30, deadline=None)
@given(corpora(), corpora(), st.integers(1, 8))
def test_hit_rates_equal_the_slow_ones(corpus, other, branch):
    documents, vocab_size = corpus
    model, reference = KatzModel.fit(documents, vocab_size), ReferenceKatz(documents, vocab_size)
    held_out = [[t % vocab_size for t in d] for d in other[0]] + [[0]]
    tables, rates = model.tables(branch), model.hit_rates(held_out, branch)
    surely, maybe, exactly, total = np.zeros(branch), np.zeros(branch), np.zeros(branch), 0
    for document in held_out:
        for a, b, c in zip([-1, -1, *document], [-1, *document], document, strict=False):
            best = np.asarray(tables.look_up(jnp.int32(a), jnp.int32(b))[0])[:vocab_size]
            exactly[: len(best)] += best == c
            p = np.array(reference.distribution(known(a, b)))
            # Tokens that the reference finds equally likely may stand in any order.
            above, equal = (p > p[c] * (1 + 1e-9)).sum(), (p >= p[c] * (1 - 1e-9)).sum()
            maybe += np.arange(branch) >= above
            surely += np.arange(branch) >= equal - 1
            total += 1
    np.testing.assert_allclose(rates, np.cumsum(exactly) / total, rtol=1e-15)
    assert np.all(surely <= rates * total + 1e-9) and np.all(rates * total <= maybe + 1e-9)
    if branch >= vocab_size:
        assert math.isclose(rates[-1], 1)


# ------------------------------------------------------------------------ device tables


def assert_best(model, tables, pairs):
    """``look_up`` returns the best tokens of ``log_probs``, descending, padded beyond V."""
    a, b = np.array(pairs, np.int32).T
    tokens, log_probs = jax.jit(lambda t, a, b: t.look_up(a, b))(tables, a, b)
    assert tokens.dtype == jnp.int32 and log_probs.dtype == jnp.float32
    kept = min(tables.branch, model.vocab_size)
    for i, (a, b) in enumerate(pairs):
        full = model.log_probs(a, b)
        best = np.sort(full)[::-1][:kept]
        np.testing.assert_allclose(log_probs[i, :kept], best, rtol=2e-7, atol=1e-7)
        # Which token stands at a rank is free among equals, but it must have that value.
        np.testing.assert_allclose(full[tokens[i, :kept]], best, rtol=1e-13)
        assert len(set(tokens[i, :kept].tolist())) == kept
        assert np.all(tokens[i, kept:] == 0) and np.all(log_probs[i, kept:] == -np.inf)


@settings(max_examples=12, deadline=None)  # each compiles the look-up anew
@given(corpora(), st.integers(1, 3), st.integers(1, 3))
def test_tables_hold_the_best_of_the_full_distribution(corpus, branch, min_count):
    documents, vocab_size = corpus
    model = KatzModel.fit(documents, vocab_size, min_trigram_count=min_count)
    assert_best(model, model.tables(branch), contexts(vocab_size))


@pytest.mark.parametrize("branch", [1, 4, 30, 64])
def test_tables_of_a_longer_text(branch):
    model = KatzModel.fit(zipf_documents(3, 30), 30)
    whole = model.tables(branch)
    assert (whole.branch, whole.vocab_size) == (branch, 30)
    assert_best(model, whole, contexts(30))
    order = model._levels[2].order
    assert 0 < len(order.keys) < 900, "both seen and unseen contexts are wanted"


def test_ranking_in_blocks_changes_nothing(monkeypatch):
    model = KatzModel.fit(zipf_documents(3, 30), 30)
    whole = model.tables(4)
    monkeypatch.setattr(tables, "_BLOCK", 50)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(model.tables(4)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_back_off_candidates_can_beat_seen_ones():
    """The case that a table of seen continuations alone would get wrong."""
    documents = [[0, 1, 2], *[[3, 1, 4]] * 30]
    model = KatzModel.fit(documents, 5)
    tokens, _ = model.tables(2).look_up(jnp.int32(0), jnp.int32(1))
    assert set(tokens.tolist()) == {2, 4}  # (0, 1) only ever saw 2


def test_look_up_of_any_shape_under_strict_promotion():
    model = KatzModel.fit(zipf_documents(4, 7), 7)
    tables = model.tables(3)
    pairs = np.array(contexts(7), np.int32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        flat = jax.jit(tables.look_up)(pairs[:, 0], pairs[:, 1])
        cube = tables.look_up(*jnp.asarray(pairs.T.reshape(2, 4, 2, 8)))
        one = tables.look_up(jnp.int32(3), jnp.int32(2))
    for flat_part, cube_part, part in zip(flat, cube, one, strict=True):
        assert cube_part.shape == (4, 2, 8, 3) and part.shape == (3,)
        np.testing.assert_array_equal(cube_part.reshape(-1, 3), flat_part)
        np.testing.assert_array_equal(part, flat_part[contexts(7).index((3, 2))])


def test_look_up_is_three_gathers_without_loop_or_scatter():
    tables = KatzModel.fit(zipf_documents(4, 7), 7).tables(3)
    text = str(jax.make_jaxpr(tables.look_up)(jnp.zeros(5, jnp.int32), jnp.zeros(5, jnp.int32)))
    assert text.count(" gather[") == 3
    assert not any(f" {name}[" in text for name in ("while", "scan", "scatter", "sort"))


def test_tables_are_a_pytree_with_static_vocabulary():
    tables = KatzModel.fit(zipf_documents(4, 7), 7).tables(3)
    leaves, treedef = jax.tree.flatten(tables)
    assert len(leaves) == 4 and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.unflatten(treedef, leaves).vocab_size == 7
    assert tables.nbytes == sum(np.asarray(leaf).nbytes for leaf in leaves)


def test_missing_tokens_do_not_wrap_onto_the_largest_key():
    """In uint32, (-1, b) is (65535, b) and (0, -1) is (65535, 65535), contexts seen here."""
    model = KatzModel.fit([*[[65535, 65535, 3]] * 9, *[[65535, 7]] * 40], 65536)
    assert_best(model, model.tables(1), [(65535, 65535), (-1, 65535), (0, -1), (-1, -1)])


def colliding_keys(count):
    """Keys that share a bucket under each of the first two salts tried for ``count`` keys."""
    keys = np.random.default_rng(5).choice(2**32, 60_000, replace=False).astype(np.uint32)
    bits = (count // 4).bit_length()
    for attempt in range(2):
        keys = keys[tables.hash_keys(keys, np.uint32(attempt * 0x9E3779B9 % 2**32), bits) == 3]
    assert len(keys) >= count
    return keys[:count]


def test_hash_table_survives_keys_chosen_to_collide():
    """With the largest vocabulary: keys up to 2**32 - 1 and the key 0 are contexts too."""
    keys = np.concatenate([colliding_keys(48), np.array([0, 2**32 - 1], np.uint32)])
    a, b = (keys // 65536).astype(np.int64), (keys % 65536).astype(np.int64)
    documents = [[x, y, 100 + i] for i, (x, y) in enumerate(zip(a, b, strict=True))] * 9
    model = KatzModel.fit(documents, 65536)
    tables = model.tables(1)
    assert int(tables.salt) not in (0, 0x9E3779B9), "the first two salts must have failed"
    tokens, _ = tables.look_up(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))
    np.testing.assert_array_equal(tokens[:, 0], 100 + np.arange(len(keys)))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 2**32 - 1), max_size=80))
def test_a_bucket_matches_its_own_keys_and_nothing_else(keys):
    """Free places must match no query, key 0 included; there is no spare value to mark them."""
    keys = np.array(sorted(keys), np.uint32)
    buckets, salt, order = tables.hash_table(keys)
    bits = len(buckets).bit_length() - 1
    others = np.setdiff1d(np.concatenate([buckets[:, :15].ravel(), np.arange(40)]), keys)
    for queries, wanted in ((keys, True), (others.astype(np.uint32), False)):
        bucket = buckets[tables.hash_keys(queries, salt, bits)]
        match = bucket[:, :15] == queries[:, None]
        assert np.all(match.sum(axis=1) == wanted)
        if wanted and len(keys):
            row = bucket[:, 15] + match.argmax(axis=1)
            np.testing.assert_array_equal(order[row], np.arange(len(keys)))


# ----------------------------------------------------------------------------- the file


@pytest.fixture
def saved(tmp_path):
    """A model with pruned trigrams and counts beyond one byte, and its file."""
    documents = [*zipf_documents(6, 8), [0, 1] * 400]
    model = KatzModel.fit(documents, 8, min_trigram_count=2)
    path = tmp_path / "ngram.safetensors"
    model.save(path)
    return model, path


def test_loaded_model_is_the_saved_one(saved):
    model, path = saved
    loaded = KatzModel.load(path)
    assert (loaded.vocab_size, loaded.sizes) == (model.vocab_size, model.sizes)
    np.testing.assert_array_equal(all_log_probs(loaded), all_log_probs(model))
    for one, other in zip(*map(jax.tree.leaves, (loaded.tables(3), model.tables(3))), strict=True):
        np.testing.assert_array_equal(one, other)
    pruned, expected = (m.prune(min_trigram_count=4) for m in (loaded, model))
    np.testing.assert_array_equal(all_log_probs(pruned), all_log_probs(expected))
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["vocab_size"] == "8" and file.metadata()["version"] == "1"
        assert len(file.get_tensor("trigram.large_counts"))


@settings(max_examples=20, deadline=None)
@given(corpus=corpora())
def test_any_model_survives_the_file(tmp_path_factory, corpus):
    model = KatzModel.fit(*corpus)
    path = tmp_path_factory.mktemp("katz") / "model"
    model.save(path)
    np.testing.assert_array_equal(all_log_probs(KatzModel.load(path)), all_log_probs(model))


def test_saving_replaces_the_file_in_one_step(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            model.prune(max_trigrams=0).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        KatzModel.load(path)
    message = str(caught.value)
    assert str(path) in message and "refit" in message and "\n" not in message


def test_missing_foreign_and_truncated_files_are_refused(saved, tmp_path):
    _, path = saved
    refused(tmp_path / "absent", "(?i)no such file")
    refused(tmp_path, str(tmp_path))
    whole = path.read_bytes()
    for length in (0, 5, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot use")
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    refused(path, "not an n-gram model")


def test_a_flipped_bit_anywhere_is_refused_or_harmless(saved):
    """Harmless are bits that say the same, such as the padding of the header."""
    model, path = saved
    whole = path.read_bytes()
    expected, refusals = all_log_probs(model), 0
    rng = np.random.default_rng(7)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.choice(header, 250, replace=False), *rng.integers(header, len(whole), 150)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = KatzModel.load(path)
        except CheckpointError:
            refusals += 1
        else:
            np.testing.assert_array_equal(all_log_probs(loaded), expected)
    assert refusals > 380


def tamper(path, change, vocab_size=8):
    """Rewrite the file with changed tensors and a checksum that fits them."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    metadata = {
        "format": "ssd_jax.katz",
        "version": "1",
        "vocab_size": str(vocab_size),
        "checksum": file.checksum_of(vocab_size, tensors),
    }
    safetensors.numpy.save_file(tensors, path, metadata)


def setting(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def swapping(name):
    def change(tensors):
        tensors[name][[0, 1]] = tensors[name][[1, 0]]

    return change


def casting(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)

    return change


def cutting(name):
    def change(tensors):
        tensors[name] = tensors[name][:-1]

    return change


DAMAGE = {
    "wrong type": (casting("trigram.tokens", np.int32), "int32"),
    "wrong type of keys": (casting("bigram.keys", np.float32), "float32"),
    "missing tensor": (lambda t: t.pop("bigram.counts"), "bigram.counts"),
    "unexpected tensor": (lambda t: t.update(extra=np.zeros(1)), "extra"),
    "two axes": (lambda t: t.update({"bigram.keys": t["bigram.keys"][None]}), "not a row"),
    "offsets not ascending": (swapping("trigram.offsets"), "offsets"),
    "offsets descending inside": (setting("bigram.offsets", 2, 0), "offsets are not ascending"),
    "offsets past the end": (setting("bigram.offsets", -1, 9999), "offsets miss"),
    "token outside V": (setting("bigram.tokens", -1, 8), "bigram tokens exceed"),
    "tokens not ascending": (swapping("unigram.tokens"), "tokens are not ascending"),
    "keys not ascending": (swapping("trigram.keys"), "keys are not ascending"),
    "key outside V": (setting("trigram.keys", -1, 64), "keys exceed"),
    "unigram key": (setting("unigram.keys", 0, 1), "unigram keys exceed"),
    "sum beyond 32 bits": (setting("unigram.large_counts", 0, 2**32 - 1), "exceed 32 bits"),
    "zero count": (setting("trigram.counts", 0, 0), "counts are not positive"),
    "lost large count": (cutting("trigram.large_counts"), "do not fit together"),
    "small large count": (setting("trigram.large_counts", 0, 3), "do not fit together"),
    "short counts": (cutting("bigram.pruned"), "differ in length"),
    "infinite discount": (setting("bigram.discounts", 0, np.inf), "discounts"),
    "NaN discount": (setting("bigram.discounts", 0, np.nan), "discounts"),
    "zero discount": (setting("unigram.discounts", 4, 0.0), "discounts"),
    "too few discounts": (cutting("trigram.discounts"), "discounts"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_with_a_fitting_checksum_is_refused(saved, damage):
    change, match = DAMAGE[damage]
    _, path = saved
    tamper(path, lambda _: None)
    KatzModel.load(path)  # the rewriting alone does no harm
    tamper(path, change)
    refused(path, match)


def test_trigram_without_its_bigram_is_refused(tmp_path):
    path = tmp_path / "model"
    KatzModel.fit([[0, 1, 2]], 4).save(path)
    tamper(path, setting("trigram.tokens", 0, 3), vocab_size=4)
    refused(path, "suffix that was never counted")


@pytest.mark.parametrize("vocab_size", [0, 7, 65537, 10**9])
def test_file_with_a_wrong_vocabulary_size_is_refused(saved, vocab_size):
    _, path = saved
    tamper(path, lambda _: None, vocab_size)
    refused(path, "vocabulary|tokens")


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        ([[0], [0, 5]], "document 1 .*outside 0 .. 4"),
        ([[-1]], "outside"),
        ([np.array([[1]])], "shape"),
        ([[0.5]], "float64"),
        ([3], "shape"),
    ],
)
def test_bad_documents_are_refused(documents, match):
    with pytest.raises(DataError, match=match):
        KatzModel.fit(documents, 5)
    with pytest.raises(DataError, match=match):
        KatzModel.fit([], 5).perplexity(documents)


def test_bad_settings_are_refused():
    for vocab_size in (0, 65537):
        with pytest.raises(ConfigError, match="vocab_size"):
            KatzModel.fit([[0]], vocab_size)
    model = KatzModel.fit([[0, 1, 2]], 3)
    with pytest.raises(ConfigError, match="memory_bytes"):
        KatzModel.fit([[0]], 3, memory_bytes=0)
    with pytest.raises(ConfigError, match="min_trigram_count"):
        model.prune(min_trigram_count=0)
    with pytest.raises(ConfigError, match="max_trigrams"):
        model.prune(max_trigrams=-1)
    with pytest.raises(ConfigError, match="max_bigrams"):
        model.prune(max_bigrams=-1)
    with pytest.raises(ConfigError, match="branch"):
        model.tables(0)
    with pytest.raises(ConfigError, match="branch"):
        model.hit_rates([[0]], 0)
    for pair in ((0, 3), (-2, 0), (3, 0)):
        with pytest.raises(DataError, match="context"):
            model.log_probs(*pair)
    with pytest.raises(DataError, match="at least one token"):
        model.perplexity([[]])
    with pytest.raises(DataError, match="at least one token"):
        model.hit_rates([[]], 2)
