"""The token tree against hand-made answers and slow Python walks."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax import stages
from ssd_jax import tree as trees

INF = np.inf


@jax.jit
def insert(tree, *candidates):
    return trees.insert(tree, trees.children(tree, *candidates))


revalue = jax.jit(trees.revalue)
best_nodes = jax.jit(trees.best_nodes, static_argnames="width")
accepted_path = jax.jit(trees.accepted_path, static_argnames=("root", "depth"))


def drawn_tree():
    """The tree of the module's drawing, grown by two insertions.

        the | cat |  sat            trunk: nodes 0, 1 and the root 2
                    /    \\
                on (3)    , (4)
                 |
                a (5)
    """
    tree = trees.plant(jnp.asarray([[10, 11, 12]]), jnp.asarray([7]), 8)
    tree = insert(
        tree, jnp.asarray([[2, 2]]), jnp.asarray([[20, 21]]), jnp.log(jnp.asarray([[0.6, 0.3]])), 1
    )
    return insert(tree, jnp.asarray([[3]]), jnp.asarray([[22]]), jnp.log(jnp.asarray([[0.5]])), 2)


def test_levels_are_counted_down_until_a_pass_gives_them_back():
    tree = trees.plant(
        jnp.asarray([[10, 11, 12]]), jnp.asarray([7]), 8, cached=(jnp.asarray([6]),), levels=3
    )
    before = tree.fields
    assert int(tree.levels) == 3
    tree = trees.mark_levels(trees.mark_levels(tree))
    assert int(tree.levels) == 1 and int(tree.passes(1)) == 0 and int(tree.count[0]) == 3
    none = jnp.full((1, 8), -1)
    tree = insert(tree, jnp.asarray([[2]]), jnp.asarray([[20]]), jnp.asarray([[-0.5]]), 1)
    tree = trees.mark_evaluated(tree, 1, none, jnp.int32(5))
    assert int(tree.levels) == 5 and int(tree.passes(1)) == 1 and int(tree.count[0]) == 4
    assert int(trees.mark_levels(tree, tree.levels).levels) == 0
    tree = trees.unevaluated(tree)
    assert int(tree.levels) == 5 and int(tree.passes(1)) == 0 and int(tree.count[0]) == 4
    np.testing.assert_array_equal(tree.token[0, :3], before[0, 0, :3])


def test_drawn_tree_and_its_mask():
    tree = drawn_tree()
    assert tree.token[0].tolist() == [10, 11, 12, 20, 21, 22, 0, 0]
    assert tree.parent[0].tolist() == [-1, -1, -1, 2, 2, 3, -1, -1]
    assert tree.depth[0, :6].tolist() == [-2, -1, 0, 1, 1, 2]
    assert tree.origin[0, :6].tolist() == [0, 0, 0, 1, 1, 2]
    assert int(tree.count[0]) == 6
    assert tree.ancestors[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # the
        [1, 1, 0, 0, 0, 0, 0, 0],  # the cat
        [1, 1, 1, 0, 0, 0, 0, 0],  # the cat sat
        [1, 1, 1, 1, 0, 0, 0, 0],  # the cat sat on
        [1, 1, 1, 0, 1, 0, 0, 0],  # the cat sat ,
        [1, 1, 1, 1, 0, 1, 0, 0],  # the cat sat on a
        [0, 0, 0, 0, 0, 0, 0, 0],  # empty
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(np.exp(tree.value[0]), [1, 1, 1, 0.6, 0.3, 0.3, 0, 0], rtol=1e-6)


def test_a_draft_leaves_what_the_stage_below_said_its_weight():
    tree, scored = drawn_tree(), np.full((1, 1, 30), -np.inf, np.float32)
    scored[0, 0, 20], scored[0, 0, 25] = np.log([0.1, 0.9])  # 21 is ruled out
    total = np.zeros((1, 1), np.float32)
    root = np.arange(8)[None] == 2
    row = np.zeros((1, 8), np.int32)
    for prior in (0.0, 0.25, 1.0):
        weight = np.full((1, 1), prior, np.float32)
        values = stages._revalue(tree, row, root, scored, np.ones((1, 1, 1)), total, weight).value
        on = (1 - prior) * 0.1 + prior * 0.6
        np.testing.assert_allclose(np.exp(values[0, 3:6]), [on, 0.0, on * 0.5], rtol=1e-5)
        assert np.isfinite(values[0, :6]).all()


def test_equal_values_prefer_the_lower_index():
    tree = drawn_tree()  # nodes 4 and 5 both have value 0.3
    everything = tree.valid
    nodes, found = best_nodes(tree.value, everything, 5, jnp.int32(5))
    assert nodes[0].tolist() == [0, 1, 2, 3, 4]
    assert found.all()


def test_short_text_leaves_trunk_slots_empty():
    tree = trees.plant(jnp.asarray([[0, 0, 12]]), jnp.asarray([1]), 5)
    assert tree.valid[0].tolist() == [False, False, True, False, False]
    assert tree.ancestors[0, 2].tolist() == [False, False, True, False, False]


def test_insert_refuses_known_impossible_and_overflowing_children():
    tree = drawn_tree()
    grown = insert(
        tree,
        jnp.asarray([[2, 2, 4, 5, 5]]),
        jnp.asarray([[20, 30, 31, 32, 33]]),
        jnp.asarray([[-0.1, -INF, -0.2, -0.4, -0.5]]),
        3,
    )
    # (2, 20) exists, (2, 30) is impossible, (4, 31) and (5, 32) fill the tree, (5, 33) no longer
    # fits.
    assert grown.token[0].tolist() == [10, 11, 12, 20, 21, 22, 31, 32]
    assert grown.parent[0, 6:].tolist() == [4, 5]
    assert int(grown.count[0]) == 8
    assert grown.ancestors[0, 7].tolist() == [True] * 4 + [False, True, False, True]
    full = insert(grown, jnp.asarray([[2]]), jnp.asarray([[40]]), jnp.asarray([[-0.1]]), 1)
    for before, after in zip(jax.tree.leaves(grown), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(before, after)


def test_accepted_path_of_the_drawn_tree():
    tree = drawn_tree()
    evaluated = jnp.asarray([[False, False, True, True, True, True, False, False]])

    def accepted(after_root, after_on, after_a):
        chosen = jnp.asarray([[0, 0, after_root, after_on, 0, after_a, 0, 0]])
        path, count = accepted_path(tree, evaluated, chosen, 2, 3)
        return path[0].tolist(), int(count[0])

    assert accepted(20, 22, 9) == ([2, 3, 5, 2], 2)
    assert accepted(20, 99, 9) == ([2, 3, 2, 2], 1)
    assert accepted(21, 22, 9) == ([2, 4, 2, 2], 1)  # node 5 agrees, but its parent does not
    assert accepted(99, 22, 9) == ([2, 2, 2, 2], 0)
    unseen = evaluated.at[0, 3].set(False)
    path, count = accepted_path(tree, unseen, jnp.asarray([[0, 0, 20, 22, 0, 0, 0, 0]]), 2, 3)
    assert int(count[0]) == 0


@st.composite
def random_growth(draw):
    """A few insertions of arbitrary distinct candidates into a tree with a trunk of two."""
    capacity = draw(st.sampled_from([3, 8, 14]))
    rounds = draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
    return capacity, rounds


def grow_randomly(capacity, seeds):
    tree = trees.plant(jnp.asarray([[1, 2]]), jnp.asarray([5]), capacity)
    for stage, seed in enumerate(seeds, start=1):
        rng = np.random.default_rng(seed)
        count = int(tree.count[0])
        pairs = rng.permutation(6 * (count - 1))[None, :6]
        parent, token = 1 + pairs // 6, pairs % 6
        log_prob = rng.choice([-INF, 0.0, -1e-7, -0.3, -2.0, -40.0], (1, 6)).astype(np.float32)
        tree = insert(
            tree,
            jnp.asarray(parent, jnp.int32),
            jnp.asarray(token, jnp.int32),
            jnp.asarray(log_prob),
            stage,
        )
    return tree


@settings(max_examples=80, deadline=None)
@given(random_growth())
def test_invariants_hold_for_any_growth(growth):
    capacity, seeds = growth
    tree = grow_randomly(capacity, seeds)
    valid = np.asarray(tree.valid[0])
    parent, token = np.asarray(tree.parent[0]), np.asarray(tree.token[0])
    value = np.asarray(tree.value[0])
    pairs = [(parent[n], token[n]) for n in range(2, capacity) if valid[n]]
    assert len(pairs) == len(set(pairs))
    for node in range(capacity):
        line, walk = node, []
        while line >= 0 and valid[node]:
            walk.append(line)
            line = parent[line] if line >= 2 else line - 1  # the trunk is a chain
        assert sorted(walk) == np.flatnonzero(tree.ancestors[0, node]).tolist()
        if valid[node] and parent[node] >= 0:
            assert parent[node] < node
            assert value[node] <= value[parent[node]]


@settings(max_examples=60, deadline=None)
@given(random_growth(), st.sampled_from([1, 4, 14]), st.integers(1, 14))
def test_best_nodes_are_sorted_distinct_and_closed_under_ancestors(growth, width, limit):
    tree = grow_randomly(*growth)
    value = np.asarray(tree.value[0])
    nodes, found = best_nodes(jnp.asarray(value)[None], tree.valid, width, jnp.int32(limit))
    chosen = np.asarray(nodes[0])[np.asarray(found[0])].tolist()
    order = sorted(np.flatnonzero(tree.valid[0]).tolist(), key=lambda n: (-value[n], n))
    assert chosen == order[: min(width, limit)]
    for node in chosen:
        assert set(np.flatnonzero(tree.ancestors[0, node])) <= set(chosen)


@settings(max_examples=60, deadline=None)
@given(random_growth(), st.integers(0, 2**31))
def test_accepted_path_equals_a_walk(growth, seed):
    tree = grow_randomly(*growth)
    rng = np.random.default_rng(seed)
    evaluated = np.asarray(tree.valid[0]) & (rng.random(tree.capacity) < 0.9)
    evaluated[1] = True
    chosen = rng.integers(0, 6, tree.capacity)
    path, count = accepted_path(
        tree, jnp.asarray(evaluated)[None], jnp.asarray(chosen, jnp.int32)[None], 1, 6
    )
    walk, node = [1], 1
    while True:
        children = [
            n
            for n in range(2, tree.capacity)
            if tree.valid[0, n]
            and tree.parent[0, n] == node
            and tree.token[0, n] == chosen[node]
            and evaluated[n]
        ]
        if not children:
            break
        (node,) = children
        walk.append(node)
    assert int(count[0]) == len(walk) - 1
    assert path[0, : len(walk)].tolist() == walk
