"""Random policies inside a few compiled capacities, and shapes at the edge of what there is.

A few dozen policies of each in the suite; ``SSD_JAX_POLICIES=1000`` tries so many.
"""

import dataclasses
import functools
import os

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import HealthCheck, assume, given, settings
from test_decode import PROMPTS, SAMPLINGS, TEXT, WIDE, assert_fresh, continuations, run, start

from ssd_jax import decode as engine
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan, Policy
from ssd_jax.sampling import Sampling

COUNT = int(os.environ.get("SSD_JAX_POLICIES", "25"))
NEAR_TIE, NEW = 1e-4, 24
CAPACITIES = {  # what policies vary within
    "no draft": dataclasses.replace(WIDE, drafts=()),
    "one draft": dataclasses.replace(WIDE, drafts=WIDE.drafts[:1], narrower=(1, 4), row_cost=0.1),
    "two drafts": WIDE,
}
TAUS, PROBABILITIES = st.floats(0.05, 5.0), st.floats(0.01, 0.99)


@functools.cache
def stack(drafts: int):
    return toys.stack("between", drafts)


def draft_plans(most: DraftPlan):
    return st.builds(
        DraftPlan,
        rounds=st.integers(0, most.rounds),
        width=st.integers(1, most.width),
        branch=st.integers(1, most.branch),
        threshold=PROBABILITIES,
        tau_greedy=TAUS,
        tau_sampled=TAUS,
        prior_greedy=st.floats(0.0, 1.0),
        prior_sampled=st.floats(0.0, 1.0),
        cost=st.floats(0.0, 2.0),
    )


@st.composite
def policies(draw, most: Plan) -> Policy:
    """Of any plan within the capacities of one."""
    assert most.ngram is not None
    ngram = NGramPlan(
        levels=draw(st.integers(0, most.ngram.levels)),
        width=draw(st.integers(1, most.ngram.width)),
        branch=draw(st.integers(1, most.ngram.branch)),
        match=most.ngram.match,
        match_prob=tuple(draw(st.lists(PROBABILITIES, min_size=1, max_size=3))),
        tau_greedy=draw(TAUS),
        tau_sampled=draw(TAUS),
    )
    plan = dataclasses.replace(
        most,
        width=draw(st.integers(1, most.width)),
        drafts=tuple(draw(draft_plans(d)) for d in most.drafts),
        ngram=ngram,
        depth=draw(st.integers(1, most.depth)),
        floor=draw(st.floats(0.0, 0.3)),
        narrower=(),
        row_cost=draw(st.floats(0.0, 0.5)),
    )
    return Policy.of(plan, match=most.ngram.match)


@functools.cache
def plain(drafts: int, sampling: str, seed: int):
    """What the oracle alone writes, and the smallest margin it does so by."""
    state, texts = run(stack(drafts), PROMPTS, NEW, drawn(sampling, seed), Plan.baseline())
    margins = [np.min(state.trace.margin[i, len(p) : len(p) + NEW]) for i, p in enumerate(PROMPTS)]
    return texts, min(margins)


def drawn(sampling: str, seed: int) -> Sampling:
    return Sampling.create(3, **SAMPLINGS[sampling], seed=[seed, seed + 1, seed + 2])


def live(state) -> list[np.ndarray]:
    """All that a state means: what is committed, cached and recorded."""
    found = [state.length, state.finish, state.rounds, *jax.tree.leaves(state.pace)]
    found.append(state.trace.rounds[: int(state.rounds)])
    for row, end in enumerate(state.length.tolist()):
        trace = state.trace
        found += [state.text[row, :end], trace.origin[row, :end], trace.margin[row, :end]]
        for cache in state.caches:
            found += [x[row, : int(cache.length[row])] for x in toys.by_slot(cache)]
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize("name", CAPACITIES)
def test_any_policy_in_any_chunks_writes_the_oracles_text_and_keeps_its_caches(
    name, record_property
):
    most = CAPACITIES[name]
    drafts, capacities = len(most.drafts), Capacities.of(most, TEXT)
    models, _ = start(stack(drafts), PROMPTS, NEW, capacities)
    checked = []

    @settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        policies(most),
        st.sampled_from(sorted(SAMPLINGS)),
        st.integers(0, 7),
        st.integers(1, NEW),
    )
    def check(policy, sampling, seed, chunk):
        expected, margin = plain(drafts, sampling, seed)
        assume(margin > NEAR_TIE)

        def decode(state, until):
            arguments = (models, stack(drafts).tables, state, drawn(sampling, seed), policy)
            return engine.decode(*arguments, until, capacities=capacities)

        _, whole = start(stack(drafts), PROMPTS, NEW, capacities)
        whole = decode(whole, whole.limit + 0)
        assert continuations(whole, PROMPTS) == expected
        _, state = start(stack(drafts), PROMPTS, NEW, capacities)
        state = decode(state, state.length + chunk)
        assert_fresh(models, state)
        while (state.finish == engine.RUNNING).any():
            state = decode(state, state.length + chunk)
        for ours, other in zip(live(state), live(whole), strict=True):
            np.testing.assert_allclose(ours, other, rtol=2e-4, atol=2e-4)
        checked.append(policy)

    check()
    record_property("tried", f"{len(checked)} random policies in capacities {name!r}")


LOOK_UP = NGramPlan(levels=2, width=2, branch=0, match=2, match_prob=(0.3, 0.6))
EDGES = {
    "a tree of its root": (dict(width=1), {}),
    "no rounds": (dict(drafts=(DraftPlan(rounds=0, width=1, branch=1),)), {}),
    "more branches than tokens": (
        dict(drafts=(DraftPlan(rounds=2, width=2, branch=64, threshold=0.0),)),
        dict(vocab_size=5),
    ),
    "a vocabulary of two": ({}, dict(vocab_size=2)),
    "one token to choose from": ({}, dict(vocab_size=1)),
    "one layer": ({}, dict(layers=1)),
    "one head": ({}, dict(n_head=1)),
    "one layer, one head, two tokens": ({}, dict(layers=1, n_head=1, vocab_size=2)),
    "a context of two": ({}, dict(n_positions=2)),
    "a context of one": ({}, dict(n_positions=1)),
    "chunks of one": (dict(chunk=1), {}),
    "one node": (dict(nodes=1, depth=1, width=2), {}),
}
NARROW = Plan(
    width=4,
    drafts=(DraftPlan(rounds=2, width=2, branch=2, threshold=0.0),),
    ngram=LOOK_UP,
    depth=4,
    nodes=8,
    chunk=4,
)


@pytest.mark.parametrize("edge", EDGES)
def test_shapes_at_the_edge_write_the_oracles_text(edge):
    changes, fields = EDGES[edge]
    plan, made = dataclasses.replace(NARROW, **changes), toys.stack(ngram=False, **fields)
    vocab, context = made.vocab_size, made.oracle.config.n_positions
    prompts = [[1 % vocab, 0], [0]] if context > 1 else [[0], [0]]
    for name in ("greedy", "top_p"):
        sampling = Sampling.create(2, **SAMPLINGS[name], seed=[3, 4])
        state, expected = run(made, prompts, 12, sampling, Plan.baseline())
        ends = [min(len(p) + 12, context) for p in prompts]
        margins = [float(jnp.min(state.trace.margin[i, :end])) for i, end in enumerate(ends)]
        _, found = run(made, prompts, 12, sampling, plan)
        assert found == expected, margins
        assert [len(p) + len(t) for p, t in zip(prompts, found, strict=True)] == ends
