"""The token tree: a fixed-capacity record of arrays, rebuilt every round.

Node indices only grow from parent to child. The first K nodes are the *trunk*, the newest
committed tokens in order, right-aligned so that the root (the newest one) is always node
``K - 1``; what the stages propose follows from node K on::

    tokens     the | cat |  sat        trunk capacity K = 3, root = node 2
    node         0    1      2
                           / \\
                   on (3)      , (4)   depth 1
                   |
                  a (5)                depth 2

Invariants, each held by a test:

  * the value of a node (log-probability of its path) never exceeds its parent's, ties go to
    the lower index, so the best W nodes by value are closed under ancestors;
  * no two valid nodes share both parent and token;
  * nothing grows below an end-of-text token; a full tree refuses quietly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

NO_PARENT = -1
UNEXPANDED = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Fields of nodes are ``[B, N]``. They lie in the rows of one array, since a GPU spends a
    kernel on every array that a loop carries.

    Attributes:
      fields: ``[B, 8, N]`` int32 rows ``token``, ``parent``, ``depth``, ``origin``, ``expanded``,
        ``count``, and the bits of ``log_prob`` and ``value``.
      ancestors: ``[B, N, N]`` bool, ``ancestors[b, i, j]``: node j is i or an ancestor of i.
    """

    fields: jax.Array
    ancestors: jax.Array

    @classmethod
    def of(cls, ancestors: jax.Array, *whole: jax.Array, log_prob, value) -> TokenTree:
        """A tree of its int32 rows in order, its float32 rows and its ancestors."""
        real = (lax.bitcast_convert_type(row, jnp.int32) for row in (log_prob, value))
        rows = [jnp.broadcast_to(row, log_prob.shape).astype(jnp.int32) for row in (*whole, *real)]
        return cls(jnp.stack(rows, axis=1), ancestors)

    @property
    def token(self) -> jax.Array:
        """Token ids."""
        return self.fields[:, 0]

    @property
    def parent(self) -> jax.Array:
        """Node index, ``NO_PARENT`` for trunk nodes."""
        return self.fields[:, 1]

    @property
    def depth(self) -> jax.Array:
        """0 at the root, negative in the trunk."""
        return self.fields[:, 2]

    @property
    def origin(self) -> jax.Array:
        """The stage that proposed the node (0 is the oracle: the trunk)."""
        return self.fields[:, 3]

    @property
    def expanded(self) -> jax.Array:
        """Index of the best stage that gave the node its children so far, ``UNEXPANDED`` if none
        did. Stages are numbered from the oracle, 0, downwards."""
        return self.fields[:, 4]

    @property
    def log_prob(self) -> jax.Array:
        """Conditional log-probability given the parent; 0 in the trunk and minus infinity for
        empty slots."""
        return lax.bitcast_convert_type(self.fields[:, 6], jnp.float32)

    @property
    def value(self) -> jax.Array:
        """Log-probability of the path; minus infinity for empty slots."""
        return lax.bitcast_convert_type(self.fields[:, 7], jnp.float32)

    @property
    def count(self) -> jax.Array:
        """``[B]`` int32, slots in use."""
        return self.fields[:, 5, 0]

    @property
    def capacity(self) -> int:
        return self.fields.shape[2]

    @property
    def valid(self) -> jax.Array:
        """``[B, N]`` bool: slots that hold a node."""
        return self.log_prob > -jnp.inf


def plant(trunk: jax.Array, length: jax.Array, capacity: int) -> TokenTree:
    """A tree that holds only its trunk.

    Args:
      trunk: ``[B, K]`` int32, the newest committed tokens, right-aligned.
      length: ``[B]`` int32, committed tokens; the trunk's slots before the text's start are
        empty.
      capacity: N, at least K.
    """
    batch, size = trunk.shape
    node = jnp.arange(capacity)
    depth = jnp.broadcast_to(node - (size - 1), (batch, capacity))
    real = (node < size) & (depth + length[:, None] > 0)
    chain = (node[:, None] >= node[None, :]) & real[:, None, :] & real[:, :, None]
    empty = jnp.where(real, 0.0, -jnp.inf)
    return TokenTree.of(
        chain,
        jnp.pad(trunk, ((0, 0), (0, capacity - size))),
        jnp.int32(NO_PARENT),
        jnp.where(node < size, depth, 0),
        jnp.int32(0),
        # Only the root may be given children; the rest of the trunk has its only one.
        jnp.where(node < size - 1, -1, UNEXPANDED),
        jnp.int32(size),
        log_prob=empty,
        value=empty,
    )


def at(field: jax.Array, nodes: jax.Array) -> jax.Array:
    """``field[b, nodes[b, ...]]`` for a ``[B, N]`` field; out-of-range nodes are clipped."""
    batch = field.shape[0]
    flat = jnp.clip(nodes, 0, field.shape[1] - 1).reshape(batch, -1)
    return jnp.take_along_axis(field, flat, axis=1, mode="promise_in_bounds").reshape(nodes.shape)


def revalue(tree: TokenTree, log_prob: jax.Array) -> TokenTree:
    """Give every node a new conditional log-probability ``[B, N]``, and its path a new value.

    Taking the minimum along the path makes the order exact: a child's sum may round above its
    parent's when the two reductions associate differently.
    """
    terms = jnp.where(tree.ancestors, log_prob[:, None, :], 0.0)
    sums = jnp.where(tree.valid, jnp.sum(terms, axis=-1), -jnp.inf)
    lowest = jnp.min(jnp.where(tree.ancestors, sums[:, None, :], jnp.inf), axis=-1)
    value = jnp.where(tree.valid, lowest, -jnp.inf)
    whole = (tree.fields[:, row] for row in range(6))
    return TokenTree.of(tree.ancestors, *whole, log_prob=log_prob, value=value)


def _rank(value: jax.Array, eligible: jax.Array) -> jax.Array:
    """``[B, N]`` int32, how many eligible nodes come before each, ties to the lower index.

    One N x N comparison instead of a sort, and the tie rule is explicit.
    """
    node = jnp.arange(value.shape[1])
    ahead = (value[:, None, :] > value[:, :, None]) | (
        (value[:, None, :] == value[:, :, None]) & (node[None, :] < node[:, None])
    )
    return jnp.sum(ahead & eligible[:, None, :], axis=-1).astype(jnp.int32)


def best_nodes(
    value: jax.Array, eligible: jax.Array, width: int, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The ``width`` best eligible nodes, best first, ties to the lower index.

    Args:
      value: ``[B, N]`` float32.
      eligible: ``[B, N]`` bool.
      width: W, static.
      limit: int32, take no more than this many.

    Returns:
      Nodes ``[B, W]`` int32 and ``[B, W]`` bool, which of them are real (a prefix).
    """
    rank = _rank(value, eligible)
    hit = eligible[:, None, :] & (rank[:, None, :] == jnp.arange(width)[:, None])
    nodes = jnp.sum(jnp.where(hit, jnp.arange(value.shape[1]), 0), axis=-1)
    found = jnp.any(hit, axis=-1) & (jnp.arange(width) < limit)
    return nodes.astype(jnp.int32), found


def rows_of_best(
    value: jax.Array, eligible: jax.Array, width: int, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`best_nodes`, from the same arguments.

    Returns:
      For each node its row among the selected, ``[B, N]`` int32 (0 where absent), and ``[B, N]``
      bool, whether it has one.
    """
    rank = _rank(value, eligible)
    hit = eligible & (rank < jnp.minimum(width, limit))
    return jnp.where(hit, rank, 0), hit


def lineage_among(tree: TokenTree, nodes: jax.Array) -> jax.Array:
    """``[B, W, W]`` bool: of some ``nodes`` ``[B, W]``, is the second the first or above it."""
    row = jnp.take_along_axis(tree.ancestors, nodes[:, :, None], 1, mode="promise_in_bounds")
    return jnp.take_along_axis(row, nodes[:, None, :], 2, mode="promise_in_bounds")


def insert(
    tree: TokenTree, parent: jax.Array, token: jax.Array, log_prob: jax.Array, stage: int
) -> TokenTree:
    """Add children. Duplicates, minus-infinite ones and those that no longer fit are refused.

    Args:
      tree: the tree so far.
      parent: ``[B, C]`` int32 node index.
      token: ``[B, C]`` int32.
      log_prob: ``[B, C]`` float32 conditional log-probability; minus infinity: no candidate.
      stage: index of the proposing stage.
    """
    count = parent.shape[1]
    wanted = log_prob > -jnp.inf
    known = (
        (tree.parent[:, None, :] == parent[:, :, None])
        & (tree.token[:, None, :] == token[:, :, None])
        & tree.valid[:, None, :]
    )
    twin = (parent[:, None, :] == parent[:, :, None]) & (token[:, None, :] == token[:, :, None])
    earlier = jnp.tri(count, k=-1, dtype=bool) & wanted[:, None, :]
    fresh = wanted & ~jnp.any(known, axis=-1) & ~jnp.any(twin & earlier, axis=-1)

    slot = tree.count[:, None] + jnp.cumsum(fresh, axis=1) - 1
    node = jnp.arange(tree.capacity)
    lands = (fresh & (slot < tree.capacity))[:, None, :] & (slot[:, None, :] == node[:, None])
    new = jnp.any(lands, axis=-1)
    source = jnp.sum(jnp.where(lands, jnp.arange(count), 0), axis=-1)

    def put(field: jax.Array, candidate: jax.Array) -> jax.Array:
        return jnp.where(new, at(candidate, source), field)

    parents = put(tree.parent, parent)
    above = jnp.clip(parents, 0)[:, :, None]
    lineage = jnp.take_along_axis(tree.ancestors, above, axis=1, mode="promise_in_bounds")
    lineage |= jnp.eye(tree.capacity, dtype=bool)
    # No child's sum exceeds its parent's value: log-probabilities are at most 0.
    value = at(tree.value, parent) + jnp.minimum(log_prob, 0.0)
    return TokenTree.of(
        jnp.where(new[:, :, None], lineage, tree.ancestors),
        put(tree.token, token),
        parents,
        jnp.where(new, at(tree.depth, parents) + 1, tree.depth),
        jnp.where(new, stage, tree.origin),
        tree.expanded,
        jnp.minimum(slot[:, -1:] + 1, tree.capacity),
        log_prob=put(tree.log_prob, log_prob),
        value=put(tree.value, value),
    )


def mark_expanded(tree: TokenTree, hit: jax.Array, stage: int) -> TokenTree:
    """Record that ``stage`` gave the nodes in ``hit`` ``[B, N]`` their children."""
    row = jnp.arange(tree.fields.shape[1])[:, None] == 4
    marked = jnp.where(hit[:, None] & row, jnp.minimum(tree.fields, stage), tree.fields)
    return dataclasses.replace(tree, fields=marked)


def accepted_path(
    tree: TokenTree, evaluated: jax.Array, chosen: jax.Array, root: int, depth: int
) -> tuple[jax.Array, jax.Array]:
    """The path along which every node is what the oracle chose at its parent.

    Args:
      tree: the tree.
      evaluated: ``[B, N]`` bool, nodes the oracle has passed over.
      chosen: ``[B, N]`` int32, the oracle's token after each evaluated node.
      root: index of the root node.
      depth: D, the deepest level looked at.

    Returns:
      Path ``[B, D + 1]`` int32 node indices, root first (entries past the end are the root),
      and ``[B]`` int32, how many nodes below the root are on it.
    """
    agrees = evaluated & at(evaluated, tree.parent) & (tree.token == at(chosen, tree.parent))
    broken = tree.ancestors & ~(agrees | (tree.depth <= 0))[:, None, :]
    accepted = tree.valid & (tree.depth > 0) & ~jnp.any(broken, axis=-1)
    node = jnp.arange(tree.capacity)
    level = jnp.arange(1, depth + 1)
    hit = accepted[:, None, :] & (tree.depth[:, None, :] == level[:, None])
    reached = jnp.any(hit, axis=-1)
    below = jnp.where(reached, jnp.sum(jnp.where(hit, node, 0), axis=-1), root)
    first = jnp.full((tree.token.shape[0], 1), root)
    path = jnp.concatenate([first, below], axis=1).astype(jnp.int32)
    return path, jnp.sum(reached, axis=1).astype(jnp.int32)  # one node a level
