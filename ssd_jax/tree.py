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
CHILDLESS = -1
_WORD = 32  # bits of an int32

# The first rows of a tree's fields; a slot for each draft follows, then what children take over
# from their parents: lineage, passes, levels, count.
_TOKEN, _PARENT, _DEPTH, _ORIGIN, _EXPANDED, _LOG_PROB, _VALUE, _SLOTS = range(8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """All of a tree is one array, since a GPU spends a kernel or two on every array that a loop
    carries. The names below are its rows, ``[B, N]`` each: a column is a node.

    Attributes:
      fields: ``[B, R, N]`` int32.
      drafts: how many models beside the oracle evaluate nodes; static.
    """

    fields: jax.Array
    drafts: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def token(self) -> jax.Array:
        """Token ids."""
        return self.fields[:, _TOKEN]

    @property
    def parent(self) -> jax.Array:
        """Node index, ``NO_PARENT`` for trunk nodes."""
        return self.fields[:, _PARENT]

    @property
    def depth(self) -> jax.Array:
        """0 at the root, negative in the trunk."""
        return self.fields[:, _DEPTH]

    @property
    def origin(self) -> jax.Array:
        """The stage that proposed the node (0 is the oracle: the trunk)."""
        return self.fields[:, _ORIGIN]

    @property
    def expanded(self) -> jax.Array:
        """Index of the best stage that gave the node its children so far, ``UNEXPANDED`` if none
        did, ``CHILDLESS`` where none may, as in empty slots. Stages are numbered from the oracle,
        0, downwards; the trunk is the oracle's."""
        return self.fields[:, _EXPANDED]

    @property
    def log_prob(self) -> jax.Array:
        """Conditional log-probability given the parent; 0 in the trunk and minus infinity for
        empty slots."""
        return lax.bitcast_convert_type(self.fields[:, _LOG_PROB], jnp.float32)

    @property
    def value(self) -> jax.Array:
        """Log-probability of the path; minus infinity for empty slots."""
        return lax.bitcast_convert_type(self.fields[:, _VALUE], jnp.float32)

    def slot(self, model: int) -> jax.Array:
        """The slot of each node in the cache of a draft, -1 if it has not evaluated the node."""
        return self.fields[:, _SLOTS + model - 1]

    @property
    def _lineage(self) -> slice:
        """The rows of the bits of each node's ancestors and of the node itself."""
        first = _SLOTS + self.drafts
        return slice(first, first - (-self.capacity // _WORD))

    def passes(self, model: int) -> jax.Array:
        """int32, passes that a draft has made over this tree."""
        return self.fields[0, self._lineage.stop + model - 1, 0]

    @property
    def levels(self) -> jax.Array:
        """int32, by how many levels the n-gram stage may still extend the tree before a draft makes
        its next pass."""
        return self.fields[0, -2, 0]

    @property
    def count(self) -> jax.Array:
        """``[B]`` int32, slots in use."""
        return self.fields[:, -1, 0]

    @property
    def capacity(self) -> int:
        return self.fields.shape[2]

    @property
    def valid(self) -> jax.Array:
        """``[B, N]`` bool: slots that hold a node."""
        return self.log_prob > -jnp.inf

    @property
    def ancestors(self) -> jax.Array:
        """``[B, N, N]`` bool, ``ancestors[b, i, j]``: node j is i or an ancestor of i."""
        return _bits(self.fields[:, self._lineage], self.capacity)


def _bits(words: jax.Array, count: int) -> jax.Array:
    """``[B, C, count]`` bool: the bits of ``words`` ``[B, L, C]``, lowest first."""
    repeated = jnp.repeat(words, _WORD, axis=1)[:, :count]
    return (repeated >> (jnp.arange(count) % _WORD)[:, None] & 1).astype(bool).swapaxes(1, 2)


def _words(bits: jax.Array) -> jax.Array:
    """``[B, L]`` int32: the bits ``[B, N]`` as words, the inverse of :func:`_bits`."""
    padded = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % _WORD)))
    place = jnp.int32(1) << jnp.arange(_WORD)
    return jnp.sum(jnp.where(padded.reshape(len(bits), -1, _WORD), place, 0), axis=-1)


def _lowest(count: jax.Array, words: int) -> jax.Array:
    """``[..., words, C]`` int32 with the lowest ``count`` ``[..., C]`` bits set."""
    here = count[..., None, :] - _WORD * jnp.arange(words)[:, None]
    some = (jnp.int32(1) << jnp.clip(here, 0, _WORD - 1)) - 1
    return jnp.where(here >= _WORD, -1, some)


def _rows(*fields: jax.Array | int, shape: tuple[int, ...]) -> list[jax.Array]:
    """Rows ``[B, 1, C]`` int32 of ``fields``, each broadcast to ``shape``; of float32 the bits."""

    def row(field) -> jax.Array:
        field = jnp.asarray(field)
        if field.dtype == jnp.float32:
            field = lax.bitcast_convert_type(field, jnp.int32)
        return jnp.broadcast_to(field, shape).astype(jnp.int32)[:, None]

    return [row(field) for field in fields]


def plant(
    trunk: jax.Array,
    length: jax.Array,
    capacity: int,
    growable: jax.Array | bool = True,
    cached: tuple[jax.Array, ...] = (),
    levels: jax.Array | int = 0,
) -> TokenTree:
    """A tree that holds only its trunk.

    Args:
      trunk: ``[B, K]`` int32, the newest committed tokens, right-aligned.
      length: ``[B]`` int32, committed tokens; the trunk's slots before the text's start are
        empty.
      capacity: N, at least K.
      growable: ``[B, K]`` bool, which of them may have children. The root alone has none yet.
      cached: ``[B]`` int32 for each draft, how many committed tokens are in its cache.
      levels: int32, see :attr:`TokenTree.levels`.
    """
    batch, size = trunk.shape
    node = jnp.arange(capacity)
    depth = jnp.where(node < size, node - (size - 1), 0)
    real = (node < size) & (depth + length[:, None] > 0)
    position = length[:, None] - 1 + depth
    spare = (0, 0), (0, capacity - size)
    growable = jnp.pad(jnp.broadcast_to(growable, trunk.shape), spare) & real
    words = -(-capacity // _WORD)
    first = jnp.maximum(size - length, 0)
    chain = _lowest(node + 1, words) & ~_lowest(first[:, None], words)
    rows = _rows(
        jnp.pad(trunk, spare),
        NO_PARENT,
        depth,
        0,
        jnp.where(growable, jnp.where(node < size - 1, 0, UNEXPANDED), CHILDLESS),
        *(2 * [jnp.where(real, 0.0, -jnp.inf)]),
        *(jnp.where(real & (position < own[:, None]), position, -1) for own in cached),
        shape=(batch, capacity),
    )
    rows += [jnp.where(real[:, None], chain, 0)]
    rows += _rows(*(len(cached) * [0]), levels, size, shape=(batch, capacity))
    return TokenTree(jnp.concatenate(rows, axis=1), len(cached))


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
    ancestors = tree.ancestors
    terms = jnp.where(ancestors, log_prob[:, None, :], 0.0)
    sums = jnp.where(tree.valid, jnp.sum(terms, axis=-1), -jnp.inf)
    lowest = jnp.min(jnp.where(ancestors, sums[:, None, :], jnp.inf), axis=-1)
    value = jnp.where(tree.valid, lowest, -jnp.inf)
    rows = _rows(log_prob, value, shape=value.shape)
    before, after = tree.fields[:, :_LOG_PROB], tree.fields[:, _SLOTS:]
    return dataclasses.replace(tree, fields=jnp.concatenate([before, *rows, after], axis=1))


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


def among(nodes: jax.Array, found: jax.Array, capacity: int) -> jax.Array:
    """``[B, N]`` bool: the inverse of :func:`best_nodes`, which nodes were selected."""
    return jnp.any((nodes[:, :, None] == jnp.arange(capacity)) & found[:, :, None], axis=1)


def ancestors_of(tree: TokenTree, nodes: jax.Array) -> jax.Array:
    """``[B, W, N]`` bool: the rows of ``tree.ancestors`` for some ``nodes`` ``[B, W]``."""
    return _bits(_columns(tree.fields[:, tree._lineage], nodes), tree.capacity)


def lineage_among(tree: TokenTree, nodes: jax.Array) -> jax.Array:
    """``[B, W, W]`` bool: of some ``nodes`` ``[B, W]``, is the second the first or above it."""
    return _columns(ancestors_of(tree, nodes), nodes)


def _columns(rows: jax.Array, nodes: jax.Array) -> jax.Array:
    """``rows[b, :, nodes[b]]`` for ``rows`` ``[B, R, N]`` and ``nodes`` ``[B, C]`` in range."""
    return jnp.take_along_axis(rows, nodes[:, None, :], axis=2, mode="promise_in_bounds")


def children(
    tree: TokenTree,
    parent: jax.Array,
    token: jax.Array,
    log_prob: jax.Array,
    stage: int,
    growable: jax.Array | bool = True,
) -> jax.Array:
    """Candidates for :func:`insert`.

    Args:
      tree: the tree.
      parent: ``[B, C]`` int32 node index.
      token: ``[B, C]`` int32; no two candidates share both parent and token.
      log_prob: ``[B, C]`` float32 conditional log-probability; minus infinity: no candidate.
      stage: index of the proposing stage.
      growable: ``[B, C]`` bool, whether the child may have children in turn.

    Returns:
      ``[B, R, C]`` int32, a column as in ``tree.fields`` for each; of itself its lineage lacks
      the node that it will be.
    """
    # No child's sum exceeds its parent's value: log-probabilities are at most 0.
    value = at(tree.value, parent) + jnp.minimum(log_prob, 0.0)
    depth = at(tree.depth, parent) + 1
    expanded, unseen = jnp.where(growable, UNEXPANDED, CHILDLESS), tree.drafts * [-1]
    own = _rows(token, parent, depth, stage, expanded, log_prob, value, *unseen, shape=parent.shape)
    inherited = _columns(tree.fields[:, tree._lineage.start :], parent)
    return jnp.concatenate([*own, inherited], axis=1)


def insert(tree: TokenTree, children: jax.Array) -> TokenTree:
    """Add ``children`` ``[B, R, C]``. Those that the tree has, impossible ones and those that no
    longer fit are refused."""
    parent, token, count = children[:, _PARENT], children[:, _TOKEN], children[:, -1, :1]
    log_prob = lax.bitcast_convert_type(children[:, _LOG_PROB], jnp.float32)
    same_parent = tree.parent[:, None] == parent[:, :, None]
    known = same_parent & (tree.token[:, None] == token[:, :, None]) & tree.valid[:, None]
    refused = jnp.any(known | ~(log_prob > -jnp.inf)[:, :, None], axis=-1)
    ordinal = jnp.cumsum(~refused, axis=1)
    node = jnp.arange(tree.capacity)
    # The n-th node takes the candidate that n minus count accepted ones precede.
    before = node - count
    source = jnp.sum(ordinal[:, :, None] <= before[:, None, :], axis=1)
    new = ((before >= 0) & (before < ordinal[:, -1:]))[:, None]

    row = jnp.arange(tree.fields.shape[1])[:, None]
    itself = (row - tree._lineage.start == node // _WORD) & (row < tree._lineage.stop)
    born = _columns(children, jnp.minimum(source, parent.shape[1] - 1))
    born |= jnp.where(itself, jnp.int32(1) << node % _WORD, 0)
    fields = jnp.where(new, born, tree.fields)
    count = jnp.minimum(count + ordinal[:, -1:], tree.capacity)[:, None]
    return dataclasses.replace(tree, fields=jnp.where(row == row[-1], count, fields))


def mark_expanded(tree: TokenTree, hit: jax.Array, stage: int) -> TokenTree:
    """Record that ``stage`` gave the nodes in ``hit`` ``[B, N]`` their children."""
    row = jnp.arange(tree.fields.shape[1])[:, None]
    marked = jnp.minimum(tree.fields, stage)
    marked = jnp.where(hit[:, None] & (row == _EXPANDED), marked, tree.fields)
    return dataclasses.replace(tree, fields=marked)


def mark_evaluated(tree: TokenTree, model: int, slot: jax.Array, levels: jax.Array) -> TokenTree:
    """Record that a draft made a pass, after which its cache has the nodes in ``slot`` ``[B, N]``
    (-1 for those it has not evaluated), and the n-gram stage ``levels`` to grow again."""
    row = jnp.arange(tree.fields.shape[1])[:, None]
    fields = jnp.where(row == _SLOTS + model - 1, slot[:, None], tree.fields)
    fields += (row == tree._lineage.stop + model - 1).astype(jnp.int32)
    return dataclasses.replace(tree, fields=jnp.where(row == row[-2], levels, fields))


def mark_levels(tree: TokenTree, grown: int | jax.Array = 1) -> TokenTree:
    """Record that the n-gram stage has ``grown`` further levels."""
    row = jnp.arange(tree.fields.shape[1])[:, None]
    return dataclasses.replace(tree, fields=tree.fields - jnp.where(row == row[-2], grown, 0))


def unevaluated(tree: TokenTree) -> TokenTree:
    """The tree as if no draft had made a pass over it, nor seen its trunk."""
    row = jnp.arange(tree.fields.shape[1])[:, None]
    slots = (row >= _SLOTS) & (row < tree._lineage.start)
    passes = (row >= tree._lineage.stop) & (row < row[-2])
    fields = jnp.where(slots, -1, jnp.where(passes, 0, tree.fields))
    return dataclasses.replace(tree, fields=fields)


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
    broken = _words(~agrees & (tree.depth > 0))[:, :, None] & tree.fields[:, tree._lineage]
    accepted = tree.valid & (tree.depth > 0) & jnp.all(broken == 0, axis=1)
    node = jnp.arange(tree.capacity)
    level = jnp.arange(1, depth + 1)
    hit = accepted[:, None, :] & (tree.depth[:, None, :] == level[:, None])
    reached = jnp.any(hit, axis=-1)
    below = jnp.where(reached, jnp.sum(jnp.where(hit, node, 0), axis=-1), root)
    first = jnp.full((tree.token.shape[0], 1), root)
    path = jnp.concatenate([first, below], axis=1).astype(jnp.int32)
    return path, jnp.sum(reached, axis=1).astype(jnp.int32)  # one node a level
