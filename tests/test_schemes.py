"""Schemes of speculative sampling are lossless, each in its own sense."""

import itertools
import math
from functools import partial

import jax
import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax.benchmark import schemes
from ssd_jax.benchmark.schemes import Scheme, Sources, drawn, matching, probable, rejection
from ssd_jax.errors import ConfigError, SamplingError
from ssd_jax.plan import Plan
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack

TOPK = {"temperature": 1.0, "top_k": 20}
SHAPE = schemes.best_shape(5, (0.6, 0.3), 3)


# --- Rejection ---------------------------------------------------------------------------


def distributions(seed, zeros_p=0, zeros_q=0, vocab=5):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(vocab, 0.7), 2)
    p[rng.permutation(vocab)[:zeros_p]] = 0
    q[rng.permutation(vocab)[:zeros_q]] = 0
    return p / p.sum(), q / q.sum()


def outcome(p, q, count):
    """The distribution of the token after a node with ``count`` children, all draws summed."""
    total = np.zeros_like(p)
    support = np.flatnonzero(q)
    for children in itertools.permutations(support, min(count, len(support))):
        chance, left = 1.0, 1.0
        for child in children:
            chance, left = chance * q[child] / left, left - q[child]
        accept, rest = schemes.acceptance(p, q, children)
        for child, rate in zip(children, accept, strict=True):
            total[child] += chance * rate
            chance *= 1 - rate
        total += chance * rest
    return total


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("zeros", [(0, 0), (2, 0), (0, 2), (2, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_after_rejection_every_token_has_the_oracles_probability(count, zeros, seed):
    p, q = distributions(seed, *zeros)
    np.testing.assert_allclose(outcome(p, q, count), p, atol=1e-12)


def test_one_child_is_accepted_as_often_as_two_distributions_agree():
    p, q = distributions(0)
    rate = sum(q[x] * schemes.acceptance(p, q, [x])[0][0] for x in range(len(q)))
    assert rate == pytest.approx(np.minimum(p, q).sum())


def test_a_draft_that_is_the_oracle_is_never_rejected():
    p, _ = distributions(0)
    assert schemes.acceptance(p, p.copy(), [3])[0] == [1.0]


# --- Whole decodes -----------------------------------------------------------------------


def table(seed, vocab=3):
    """A model over very few tokens: log-weights that depend on the newest two."""
    rows = 1.2 * np.random.default_rng(seed).normal(size=(vocab, vocab, vocab))

    def weights(text, tree):
        context = [(*text, *path)[-2:] for path in tree]
        return np.array([rows[a, b] for a, b in context], np.float32)

    return weights


def table_sources(seed, **fields):
    """Noise that is new for every seed, the same for every scheme."""
    noise = np.random.default_rng([1, seed]).gumbel(size=(16, 3)).astype(np.float32)
    return Sources(
        oracle=table(0),
        draft=table(1),
        noise=lambda position: noise[position],
        rng=np.random.default_rng([2, seed]),
        **fields,
    )


def deviation(scheme, runs=3000, length=3):
    """How far the texts that a scheme writes are from the oracle's distribution: chi-square
    less its expectation, in standard deviations."""
    prompt, oracle = [0, 1], table(0)
    seen = np.zeros((3,) * length)
    for seed in range(runs):
        done = schemes.decode(table_sources(seed), scheme, prompt, len(prompt) + length)
        seen[tuple(done.tokens)] += 1
    expected = np.empty_like(seen)
    for text in np.ndindex(*seen.shape):
        chances = [
            schemes.softmax(oracle([*prompt, *text[:i]], [()])[0])[text[i]] for i in range(length)
        ]
        expected[text] = runs * math.prod(chances)
    freedom = seen.size - 1
    return (np.sum((seen - expected) ** 2 / expected) - freedom) / math.sqrt(2 * freedom)


def small(scheme):
    """A scheme with its trees cut to what a vocabulary of 3 tokens fills."""
    options = dict(scheme.grow.keywords)
    options |= {"nodes": 4} if "nodes" in options else {"shape": SHAPE if () in SHAPE else {}}
    return Scheme(scheme.name, partial(scheme.grow.func, **options), scheme.verify)


@pytest.mark.parametrize("scheme", schemes.SCHEMES, ids=lambda s: s.name)
def test_texts_have_the_oracles_distribution(scheme):
    assert abs(deviation(small(scheme))) < 4


def test_rejection_of_children_that_are_no_draws_is_not_lossless():
    """The control: the test above sees a bias where there is one."""
    biased = Scheme("", partial(schemes.fixed_tree, shape=SHAPE, rank=probable), rejection)
    assert deviation(biased) > 10


@pytest.mark.parametrize("rank", [drawn, probable])
def test_shared_noise_gives_the_oracles_own_text_in_fewer_passes(rank):
    plain = Scheme("", partial(schemes.fixed_tree, shape={}, rank=rank), matching)
    guessed = Scheme("", partial(schemes.best_tree, nodes=5, rank=rank), matching)
    passes = {plain: 0, guessed: 0}
    for seed in range(50):
        texts = []
        for scheme in (plain, guessed):
            done = schemes.decode(table_sources(seed), scheme, [0, 1], 14)
            texts.append(done.tokens)
            passes[scheme] += done.passes
        assert texts[0] == texts[1]
    assert passes[plain] == 50 * 12
    assert passes[guessed] < 0.6 * passes[plain]


@pytest.mark.parametrize("scheme", schemes.SCHEMES, ids=lambda s: s.name)
def test_a_text_ends_at_its_end_of_text_token_and_at_the_limit(scheme):
    for seed in range(20):
        done = schemes.decode(table_sources(seed, eos=(2,)), small(scheme), [0, 1], 12)
        assert 2 not in done.tokens[:-1]
        assert len(done.tokens) == 10 or done.tokens[-1] == 2


# --- Trees -------------------------------------------------------------------------------


def test_the_best_fixed_tree_by_hand():
    # Values: 0.6 and 0.3; 0.36, 0.18 and 0.18, 0.09 below them; 0.216 below the 0.36.
    assert SHAPE == {(): 2, (0,): 2, (0, 0): 1}
    assert schemes.best_shape(3, (0.6, 0.3), 1) == {(): 2}, "no more nodes than there are"
    assert schemes.best_shape(4, (0.6,), 4) == schemes.chain(4)


@pytest.mark.parametrize("rank", [drawn, probable])
def test_the_tree_by_value_holds_the_most_valuable_of_all_nodes(rank):
    sources, text = table_sources(3), [0, 1]
    values = {(): 0.0}
    for path in itertools.chain.from_iterable(
        itertools.product(range(3), repeat=level) for level in (1, 2, 3)
    ):
        above = path[:-1]
        weights = sources.draft(text, [above])[0]
        scores = rank(weights, sources.noise(len(text) + len(above)))
        values[path] = values[above] + math.log(schemes.softmax(scores)[path[-1]])
    best = sorted(values, key=lambda path: -values[path])
    found = schemes.best_tree(sources, text, 3, nodes=7, rank=rank, branch=3)
    assert set(found.tree) == set(best[:8])
    assert all(path[:-1] in found.tree[:i] for i, path in enumerate(found.tree) if path)


def test_excluded_tokens_are_no_children_and_nothing_grows_below_an_end():
    sources = table_sources(0, eos=(0,))

    def draft(text, tree):
        return np.array([[0.0, -1.0, -np.inf]] * len(tree), np.float32)

    sources = Sources(sources.oracle, draft, sources.noise, sources.rng, sources.eos)
    shape = {(): 3, (0,): 3, (1,): 3}
    tree = schemes.fixed_tree(sources, [0, 1], 9, shape=shape, rank=probable).tree
    assert tree == [(), (0,), (1,), (1, 0), (1, 1)]


# --- On models ---------------------------------------------------------------------------


def test_a_reader_sees_text_and_ancestors_and_nothing_else():
    model, sampling = toys.model(0), Sampling.create(1)
    reader = schemes.Reader(model, sampling, longest=40, rows=8)
    rng = np.random.default_rng(0)
    text = rng.integers(0, toys.VOCAB, 30).tolist()
    tree = [(), (1,), (2,), (1, 3), (2, 3), (1, 3, 4)]
    # The text grows, stays as it is, shrinks and changes.
    plain = jax.jit(lambda model, tokens: model(tokens)[0])
    for known in (text[:20], text[:23], text[:23], text[:9], [*text[:5], 7, 7], text[:1]):
        for nodes in (tree, [()]):
            for path, weights in zip(nodes, reader(known, nodes), strict=True):
                alone = np.zeros((1, 40), np.int32)
                count = len(known) + len(path)
                alone[0, :count] = *known, *path
                expected = plain(model, alone)[0, count - 1]
                np.testing.assert_allclose(weights, expected, atol=2e-4)


@pytest.mark.parametrize("options", [{}, TOPK], ids=["greedy", "sampled"])
def test_with_shared_noise_text_and_passes_are_the_engines(options):
    stack, prompt = toys.stack(), [5, 7, 11, 2]
    options = {"max_new_tokens": 24, "seed": 4} | options
    engine = ssd_jax.generate(stack, prompt, plan=Plan.speculative(schemes.CHAIN), **options)
    done = {
        scheme.name: schemes.run(stack, scheme, prompt, **options)
        for scheme in schemes.SCHEMES
        if scheme.verify is matching
    }
    assert {tuple(own.tokens) for own in done.values()} == {tuple(engine.tokens)}
    chain = done["shared noise, chain"]
    assert chain.passes == engine.stats.passes["oracle"]
    # In the last round the engine's draft may read a token of the text, for nothing.
    assert engine.stats.passes["draft"] - chain.draft_passes in (0, 1)


def test_a_table_of_a_draft_that_always_agrees():
    rows = schemes.compare(
        toys.stack("always"),
        [[3, 1, 4], [1, 5]],
        max_new_tokens=2 * (schemes.CHAIN + 1),
        samplings={"sampled": TOPK},
        say=lambda line: None,
    )
    by_name = {row["scheme"]: row for row in rows}
    assert list(by_name) == [scheme.name for scheme in schemes.SCHEMES]
    for name in ("rejection, chain", "shared noise, chain"):
        assert by_name[name]["tokens per oracle pass"] == schemes.CHAIN + 1
        assert by_name[name]["standard error"] == 0
    assert by_name["shared noise, chain"]["difference"] == 0
    assert by_name["rejection, chain"]["difference"] is None


def test_figures_by_hand():
    # 12 tokens in 6 passes; the prompts deviate by 2 and -2 tokens, that is 2/3 and -2/3 a pass.
    own = [schemes.Decoded([0] * 8, 3, 9), schemes.Decoded([0] * 4, 3, 3)]
    row = schemes._figures(own, None)
    assert row["tokens per oracle pass"] == 2
    assert row["standard error"] == pytest.approx(2 / 3)
    assert row["draft passes per oracle pass"] == 2
    same = schemes._figures(own, own)
    assert same["difference"] == same["its standard error"] == 0
    assert schemes._figures(own[:1], None)["standard error"] is None


def test_what_cannot_be_compared_is_refused():
    stack = toys.stack()
    with pytest.raises(SamplingError, match="greedy"):
        schemes.compare(stack, [[1]], max_new_tokens=2, samplings={"greedy": {"temperature": 0.0}})
    with pytest.raises(ConfigError, match="draft"):
        schemes.compare(Stack(stack.oracle), [[1]], max_new_tokens=2)
