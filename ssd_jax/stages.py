"""The stages: each one grows the token tree.

Stage 0 is the oracle, stages 1 to M - 1 are model drafts, stage M is the n-gram. A draft
repeats: let the stage below grow the tree; evaluate the best nodes it has not seen, in one
pass; give existing children its own probabilities and add its best new ones. A guess of the
stage below that the draft confirms is a draft pass saved (staging: Spector and Ré 2023, §3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ssd_jax import tree as trees
from ssd_jax.kv_cache import KVCache, keep
from ssd_jax.ngram import NGramTables
from ssd_jax.plan import Capacities, Policy
from ssd_jax.processors import History, process
from ssd_jax.sampling import Noise, Sampling, best_few, perturb, scores, take
from ssd_jax.spans import within
from ssd_jax.tree import TokenTree, at

# Mean of the standard Gumbel distribution: stands for the unknown noise of the tokens that
# the n-gram stage does not list.
EULER = 0.5772157

jax.tree_util.register_dataclass(Policy)  # here, so that plan.py does without JAX


@dataclasses.dataclass(frozen=True)
class Round:
    """What every stage may look at during one round (closed over, not carried).

    Attributes:
      models: the oracle, then the drafts.
      tables: the n-gram stage's trigram, or ``None``.
      text: ``[B, S']`` int32 buffer of committed tokens.
      length: ``[B]`` int32, how many.
      start: ``[B]`` int32, how many of them are the prompt's.
      limit: ``[B]`` int32, the length at which a row ends.
      active: ``[B]`` bool.
      drafting: bool, whether anything is proposed in this round.
      trusted: bool, whether the model drafts are asked.
      eos: ``[B, F]`` int32 end-of-text ids, padded with -1.
      noise: of the positions that the tree may reach, ``None`` if all rows are greedy.
      history: what processors need to know of the text, ``None`` without them.
    """

    models: tuple[Any, ...]
    tables: NGramTables | None
    text: jax.Array
    length: jax.Array
    start: jax.Array
    limit: jax.Array
    active: jax.Array
    drafting: jax.Array
    trusted: jax.Array
    eos: jax.Array
    noise: Noise | None
    history: History | None
    sampling: Sampling
    policy: Policy
    capacities: Capacities

    def for_drafts(self) -> Round:
        """The same to models that draft: no row is active where they are not asked."""
        return dataclasses.replace(self, active=self.active & self.drafting & self.trusted)

    def growable(self, token: jax.Array, depth: jax.Array) -> jax.Array:
        """``[B, C]`` bool: whether nodes of a ``token`` and a ``depth`` may have children."""
        ended = (depth > 0) & jnp.any(token[:, :, None] == self.eos[:, None, :], axis=-1)
        deepest = jnp.minimum(self.policy.depth, self.capacities.depth)
        # The oracle adds a token of its own, so the last position is never drafted for.
        room = self.position(depth) + 2 < self.limit[:, None]
        return ~ended & (depth < deepest) & room & self.active[:, None]

    def position(self, depth: jax.Array) -> jax.Array:
        """``[B, C]`` int32 absolute position of nodes of a ``depth``."""
        return self.length[:, None] - 1 + depth

    def noise_after(self, tree: TokenTree, nodes: jax.Array) -> jax.Array:
        """``[B, W]`` int32, which of the noise's entries decides the children of some nodes; their
        positions where there is no noise."""
        position = self.position(at(tree.depth, nodes)) + 1
        return position if self.noise is None else self.noise.entry(position)

    def tau(self, stage: int) -> jax.Array:
        """``[B]`` float32 calibration of a proposing stage."""
        return self._by_row(self.policy.tau[stage - 1])

    def prior(self, stage: int) -> jax.Array:
        """``[B]`` float32 weight of what the stage below a draft said."""
        return self._by_row(self.policy.prior[stage - 1])

    def _by_row(self, both: jax.Array) -> jax.Array:
        """``[B]``: the one of two values, for greedy rows and for those that sample."""
        draw = self.sampling.draw
        if draw is None:
            return jnp.broadcast_to(both[0], self.length.shape)
        return jnp.where(draw.sampled, both[1], both[0])


def forward(rnd: Round, model: int, *args, **kwargs) -> tuple[jax.Array, KVCache]:
    """A pass of one model, named in the compiled program for :mod:`ssd_jax.gpu_report`."""
    with jax.named_scope(f"model{model}"):
        return rnd.models[model](*args, **kwargs)


def catch_up(rnd: Round, model: int, cache: KVCache, backlog: int) -> tuple[KVCache, jax.Array]:
    """Evaluate committed tokens in chunks until at most ``backlog`` are missing.

    This ends the prefill, and brings back a draft that was switched off. A model whose positions
    run out stays behind.

    Returns:
      The cache, and int32, the number of passes made.
    """
    chunk, goal = rnd.capacities.chunk, _in_reach(rnd, model)
    behind = rnd.active & (rnd.length - cache.length > backlog) & (cache.length < goal)
    goal = jnp.where(behind, goal, cache.length)
    passes = -(-jnp.max(goal - cache.length) // chunk)
    # Counted before the loop: after it, the old length would be a copy.
    cache, passes = lax.optimization_barrier((cache, passes))

    def step(cache):
        return _extend(rnd, model, cache, chunk, goal)

    return lax.while_loop(lambda cache: jnp.any(cache.length < goal), step, cache), passes


def prefill(rnd: Round, model: int, cache: KVCache) -> KVCache:
    """Evaluate committed tokens in wide passes as long as all of their chunks are needed, the last
    of which may not be full: a slot for each row is there without any further one."""
    chunk, wide = rnd.capacities.chunk, rnd.capacities.prefill_rows(rnd.length.shape[0])
    if wide == chunk:
        return cache
    goal = _in_reach(rnd, model)

    def step(cache):
        return _extend(rnd, model, cache, wide, goal)

    def more(cache):
        return jnp.any(rnd.active & (goal - cache.length > wide - chunk))

    return lax.while_loop(more, step, cache)


def foresight(rnd: Round, model: int, newest: int, among: int) -> jax.Array:
    """A trial of a draft: how many of the text's ``newest`` tokens it would have had ``among`` its
    best.

    It reads them anew and nothing before them, so that neither is its cache needed nor changed. A
    text must be longer than they are.

    Returns:
      int32, of all active rows together.
    """
    position = rnd.length[:, None] - 1 - newest + jnp.arange(newest + 1)
    token = at(rnd.text, position)
    reachable = jnp.clip(position[:, :-1], 0, rnd.models[model].config.n_positions - 1)
    with jax.named_scope("trial"):
        logits, _ = forward(rnd, model, token[:, :-1], reachable)
    own = take(logits, token[:, 1:, None], axis=2)
    # Itself included, and whatever is no number.
    rank = jnp.sum(~(logits < own), axis=-1)
    return jnp.sum(rnd.active[:, None] & (rank <= among))


def _in_reach(rnd: Round, model: int) -> jax.Array:
    """``[B]`` int32, how much of the text before its newest token a model has positions for."""
    return jnp.minimum(rnd.length - 1, rnd.models[model].config.n_positions)


def _extend(rnd: Round, model: int, cache: KVCache, rows: int, goal: jax.Array) -> KVCache:
    """One pass over the next ``rows`` tokens of the text, of which those before ``goal`` count."""
    slots = jnp.arange(cache.slots)
    position = cache.length[:, None] + jnp.arange(rows)
    with jax.named_scope("catch_up"):
        _, written = forward(
            rnd,
            model,
            at(rnd.text, position),
            jnp.minimum(position, rnd.models[model].config.n_positions - 1),
            mask=slots <= position[:, :, None],
            cache=cache,
            offset=cache.length,
        )
    return dataclasses.replace(written, length=jnp.minimum(cache.length + rows, goal))


def evaluate(
    rnd: Round,
    model: int,
    tree: TokenTree,
    cache: KVCache,
    nodes: jax.Array,
    rows: jax.Array,
    hit: jax.Array,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """One forward pass over some nodes, each attending to the text and its own ancestors.

    Args:
      rnd: the round.
      model: index of the model.
      tree: the tree.
      cache: the model's.
      nodes: ``[B, W]`` int32, ancestors already evaluated or among them.
      rows, hit: ``[B, N]`` int32 and bool, the place of each node among these, and whether it
        has one (:func:`ssd_jax.tree.rows_of_best`).

    Returns:
      Logits ``[B, W, V]`` float32, the slot of each node in the cache ``[B, N]`` int32, and the
      written cache.
    """
    width = nodes.shape[1]
    base = jnp.max(rnd.length)  # scratch slots follow the longest row's text
    first = base + tree.passes(model) * width
    slot = jnp.where(hit, first + rows, tree.slot(model))
    lineage = trees.ancestors_of(tree, nodes)
    scratch = base + jnp.arange(rnd.capacities.scratch(model))
    block = jnp.any(lineage[:, :, None, :] & (slot[:, None, :] == scratch[:, None])[:, None], -1)
    committed = jnp.arange(cache.slots) < cache.length[:, None, None]
    committed = jnp.broadcast_to(committed, (*nodes.shape, committed.shape[2]))
    network = rnd.models[model]
    position = jnp.clip(rnd.position(at(tree.depth, nodes)), 0, network.config.n_positions - 1)
    logits, cache = forward(
        rnd,
        model,
        at(tree.token, nodes),
        position,
        mask=lax.dynamic_update_slice_in_dim(committed, block, base, axis=2),
        cache=cache,
        offset=first,
    )
    return logits, slot, cache


def processed(rnd: Round, tree: TokenTree, nodes: jax.Array, logits: jax.Array) -> jax.Array:
    """The logits ``[B, W, V]`` after some nodes, as processors leave them after each one's path."""
    processors = rnd.sampling.processors
    if processors is None or rnd.history is None:
        return logits
    depth = jnp.maximum(at(tree.depth, nodes), 0)
    recent = _recent_tokens(rnd, tree, nodes, max(rnd.capacities.depth, processors.reach))
    new = rnd.length[:, None] + depth - rnd.start[:, None]
    return process(logits, processors, rnd.history, recent, depth, new, rnd.eos)


def commit(
    rnd: Round,
    cache: KVCache,
    slot: jax.Array,
    path: jax.Array,
    known: jax.Array,
    length: jax.Array,
) -> KVCache:
    """Keep what a draft has evaluated of the newly committed text.

    Args:
      rnd: the round.
      cache: the draft's cache.
      slot: ``[B, N]`` int32, where each node lies in it, or -1.
      path: ``[B, K + D]`` int32, nodes of the trunk and of the accepted path, in order.
      known: ``[B]`` int32, how many of them are real.
      length: ``[B]`` int32, the new length of the text; its newest token stays the next root.
    """
    behind = cache.length - (rnd.length - rnd.capacities.trunk)
    index = behind[:, None] + jnp.arange(path.shape[1])
    slots = at(slot, at(path, index))
    have = (index >= 0) & (index < known[:, None]) & (slots >= 0)
    # Those before the first gap, of which there is one at the end.
    have = jnp.pad(have, ((0, 0), (0, 1)))
    place = jnp.arange(have.shape[1], dtype=jnp.int32)
    count = jnp.min(jnp.where(have, place[-1], place), axis=1)
    count = jnp.clip(count, 0, jnp.maximum(length - 1 - cache.length, 0))
    return keep(cache, jnp.maximum(slots, 0), count)


def grow(
    rnd: Round, stage: int, tree: TokenTree, caches: tuple[KVCache, ...]
) -> tuple[TokenTree, tuple[KVCache, ...]]:
    """Let a stage, with all the stages below it, grow the tree.

    Args:
      rnd: the round.
      stage: 1 for the first draft, and so on.
      tree: the tree.
      caches: the drafts', first draft first.
    """
    if stage == len(rnd.models):
        return _grow_ngram(rnd, tree), caches
    draft = stage - 1
    threshold = rnd.policy.threshold[draft]
    begun = tree.passes(stage)

    def worthwhile(tree, caches) -> jax.Array:
        best = jnp.where(_open(rnd, stage, tree, caches[draft]), tree.value, -jnp.inf)
        made = tree.passes(stage)
        room = (made < rnd.capacities.passes[stage]) & (made - begun < rnd.policy.rounds[draft])
        # An empty tree's best is minus infinity, which is no pass even at threshold 0.
        return rnd.trusted & jnp.any(room & (best >= threshold) & (best > -jnp.inf))

    def one_pass(carry):
        tree, caches = carry
        tree, cache = _draft_pass(rnd, stage, tree, caches[draft])
        return tree, (*caches[:draft], cache, *caches[draft + 1 :])

    def one_round(carry):
        _, tree, caches = carry
        tree, caches = grow(rnd, stage + 1, tree, caches)
        more = worthwhile(tree, caches)

        def due(carry) -> jax.Array:
            return more & (carry[0].levels == 0)

        # A loop of at most one trip, as a pass gives the n-gram stage its levels back: a
        # conditional would copy the cache, and leaving the lower stages' last turn to after the
        # loop would compile them twice.
        return more, *lax.while_loop(due, one_pass, (tree, caches))

    carry = (rnd.drafting, tree, caches)
    _, tree, caches = lax.while_loop(lambda carry: carry[0], one_round, carry)
    return tree, caches


def _open(rnd: Round, stage: int, tree: TokenTree, cache: KVCache) -> jax.Array:
    """``[B, N]`` bool: nodes a draft could usefully evaluate now. Closed under ancestors."""
    in_reach = rnd.position(tree.depth) < rnd.models[stage].config.n_positions
    up_to_date = cache.length >= rnd.length - rnd.capacities.trunk
    growable = tree.expanded != trees.CHILDLESS
    return growable & (tree.slot(stage) < 0) & in_reach & up_to_date[:, None]


def _draft_pass(
    rnd: Round, stage: int, tree: TokenTree, cache: KVCache
) -> tuple[TokenTree, KVCache]:
    """One pass of a model draft: evaluate, re-value the children there are, add new ones."""
    draft = stage - 1
    width, branch = rnd.capacities.widths[stage], rnd.capacities.branches[draft]
    wanted = (tree.value, _open(rnd, stage, tree, cache), width, rnd.policy.width[stage])
    nodes, found = trees.best_nodes(*wanted)
    row, hit = trees.rows_of_best(*wanted)
    logits, slot, cache = evaluate(rnd, stage, tree, cache, nodes, row, hit)
    logits = processed(rnd, tree, nodes, logits)
    scored = scores(logits, rnd.noise, rnd.noise_after(tree, nodes), rnd.sampling.draw, rough=True)
    scored = lax.optimization_barrier(scored)  # computed once for its three readers
    tau = rnd.tau(stage)[:, None, None]
    best, token = best_few(scored, min(branch, scored.shape[-1]))
    highest = best[:, :, :1]
    total = jnp.log(jnp.sum(jnp.exp((scored - highest) / tau), axis=-1)) + (highest / tau)[:, :, 0]

    # Nodes that a better stage has expanded were evaluated for their keys and values only.
    ours = found & (at(tree.expanded, nodes) > stage)
    hit &= tree.expanded > stage
    tree = _revalue(tree, row, hit, scored, tau, total, rnd.prior(stage)[:, None])
    best = best / tau - total[:, :, None]
    allowed = ours[:, :, None] & (jnp.arange(best.shape[-1]) < rnd.policy.branch[draft])
    log_prob = jnp.where(allowed, best, -jnp.inf)
    tree = trees.insert(tree, _children(rnd, tree, nodes, token, log_prob, stage))
    # One level at least, as it is by them that the loop around this pass ends.
    tree = trees.mark_evaluated(tree, stage, slot, jnp.maximum(rnd.policy.levels, 1))
    return trees.mark_expanded(tree, hit, stage), cache


def _revalue(tree: TokenTree, row, hit, scored, tau, total, prior) -> TokenTree:
    """Value the existing children of the nodes in ``hit`` ``[B, N]``, whose rows are ``row``, by
    the softmax of ``scored`` ``[B, W, V]`` over ``tau``, of which ``total`` ``[B, W]`` is the
    ``logsumexp``, interpolated with what the stage below said (Jelinek and Mercer 1980), whose
    weight is ``prior`` ``[B, 1]``: a small draft copies less well than a look-up in the text."""
    batch, _, vocab = scored.shape
    row = at(row, tree.parent)
    fresh = take(scored.reshape(batch, -1), row * vocab + tree.token, axis=1)
    fresh = fresh / tau[:, 0] - at(total, row)
    mean = jnp.logaddexp(jnp.log1p(-prior) + fresh, jnp.log(prior) + tree.log_prob)
    # A child that this stage rules out altogether stays, at a floor: a slot is never vacated.
    mean = jnp.where(fresh > -jnp.inf, jnp.maximum(mean, -1e4), -1e4)
    mine = tree.valid & (tree.depth > 0) & at(hit, tree.parent)
    return trees.revalue(tree, jnp.where(mine, mean, tree.log_prob))


def _children(
    rnd: Round, tree: TokenTree, nodes: jax.Array, token: jax.Array, log_prob: jax.Array, stage: int
) -> jax.Array:
    """Children ``[B, W, X]`` of ``nodes`` ``[B, W]``, those above the floor, to be inserted."""
    batch, _, each = token.shape
    path = at(tree.value, nodes)[:, :, None] + log_prob
    log_prob = jnp.where(path >= rnd.policy.floor, log_prob, -jnp.inf)
    parent = jnp.broadcast_to(nodes[:, :, None], token.shape)
    flat = (parent.reshape(batch, -1), token.reshape(batch, -1), log_prob.reshape(batch, -1))
    depth = jnp.repeat(at(tree.depth, nodes), each, axis=1) + 1
    return trees.children(tree, *flat, stage, rnd.growable(flat[1], depth))


def _grow_ngram(rnd: Round, tree: TokenTree) -> TokenTree:
    """Extend the best leaves by table look-up, as many levels as are due, without a model."""
    if rnd.capacities.ngram is None:
        return trees.mark_levels(tree, tree.levels)
    width, branch, match = rnd.capacities.ngram
    stage = len(rnd.models)

    def level(tree: TokenTree) -> TokenTree:
        leaves = tree.expanded == trees.UNEXPANDED
        best = (tree.value, leaves, width, rnd.policy.ngram_width)
        nodes, found = trees.best_nodes(*best)
        recent = _recent_tokens(rnd, tree, nodes, max(match, 2))
        token, log_prob = _propose(rnd, tree, nodes, recent, branch, match)
        log_prob = jnp.where(found[:, :, None], log_prob, -jnp.inf)
        children = _children(rnd, tree, nodes, token, log_prob, stage)
        # With all that is read of it behind a barrier, XLA writes the tree in place.
        tree = trees.insert(tree, lax.optimization_barrier(children))
        tree = trees.mark_levels(tree)
        return trees.mark_expanded(tree, trees.among(nodes, found, tree.capacity), stage)

    return lax.while_loop(lambda tree: tree.levels > 0, level, tree)


def _recent_tokens(rnd: Round, tree: TokenTree, nodes: jax.Array, count: int) -> jax.Array:
    """``[B, W, count]`` int32: each node's token and those before it, newest first; -1 where
    the text does not reach back so far."""
    recent, node, depth = [], nodes, at(tree.depth, nodes)
    for _ in range(count):
        position = rnd.length[:, None] - 1 + depth
        token = jnp.where(depth > 0, at(tree.token, node), at(rnd.text, position))
        recent.append(jnp.where(position >= 0, token, -1))
        node, depth = at(tree.parent, node), depth - 1
    return jnp.stack(recent, axis=-1)


def _propose(
    rnd: Round, tree: TokenTree, nodes: jax.Array, recent: jax.Array, branch: int, match: int
) -> tuple[jax.Array, jax.Array]:
    """Candidates of the n-gram stage: ``[B, W, X]`` tokens and log-probabilities."""
    entry = rnd.noise_after(tree, nodes)
    listed = []
    if branch:
        assert rnd.tables is not None
        token, log_prob = rnd.tables.look_up(recent[:, :, 1], recent[:, :, 0])
        token, log_prob = token[:, :, :branch], log_prob[:, :, :branch]
        log_prob = _katz_log_prob(rnd, entry, token, log_prob)
        allowed = jnp.arange(token.shape[-1]) < rnd.policy.ngram_branch
        listed.append((token, jnp.where(allowed, log_prob, -jnp.inf)))
    if match:
        token, log_prob = (x[:, :, None] for x in _look_up_text(rnd, recent[:, :, :match]))
        log_prob = _win_log_prob(rnd, entry, token, log_prob)
        for i, (other, value) in enumerate(listed):
            # Where both propose a token, the look-up's entry carries the better value alone.
            twin = (other == token) & (log_prob > -jnp.inf)
            same = jnp.max(jnp.where(twin, value, -jnp.inf), axis=-1, keepdims=True)
            log_prob = jnp.maximum(log_prob, same)
            listed[i] = other, jnp.where(twin, -jnp.inf, value)
        listed.insert(0, (token, log_prob))
    token, log_prob = (jnp.concatenate(entries, -1) for entries in zip(*listed, strict=True))
    return token, log_prob


def _noise_of(rnd: Round, entry: jax.Array, token: jax.Array) -> jax.Array | float:
    """``[B, W, X]`` noise of some tokens, of the entries ``[B, W]``."""
    if rnd.noise is None:
        return 0.0
    batch, _, vocab = rnd.noise.values.shape
    index = (entry[:, :, None] * vocab + token).reshape(batch, -1)
    return take(rnd.noise.values.reshape(batch, -1), index, axis=1).reshape(token.shape)


def _katz_log_prob(rnd: Round, entry, token, log_prob) -> jax.Array:
    """Value of trigram continuations: softmax of their perturbed scores, with the mass that is
    not listed as one more entry."""
    rest = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(log_prob), axis=-1, keepdims=True), 1e-6))
    tau = rnd.tau(len(rnd.models))[:, None, None]
    score = perturb(log_prob, _noise_of(rnd, entry, token), rnd.sampling.draw) / tau
    other = perturb(rest, EULER, rnd.sampling.draw) / tau
    listed = jax.nn.logsumexp(score, axis=-1, keepdims=True)
    return score - jnp.logaddexp(listed, other)


def _win_log_prob(rnd: Round, entry, token, log_prob) -> jax.Array:
    """Value of a token believed to have probability ``exp(log_prob)``.

    When sampling, its own noise ``g`` is known and the best of all the others is distributed
    as ``log(1 - p) + Gumbel``, so it wins with probability ``exp(-(1 - p) / p * exp(-g))``.
    """
    draw = rnd.sampling.draw
    if draw is None:
        return log_prob
    odds = jnp.expm1(-log_prob)
    noise = _noise_of(rnd, entry, token)
    wins = jnp.maximum(-odds * jnp.exp(-noise), -1e4)
    wins = jnp.where(log_prob > -jnp.inf, wins, -jnp.inf)
    return jnp.where(draw.sampled[:, None, None], wins, log_prob)


def _look_up_text(rnd: Round, recent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What followed the longest, latest earlier occurrence of the newest tokens in the text.

    Args:
      rnd: the round.
      recent: ``[B, W, match]`` int32, newest first.

    Returns:
      Tokens ``[B, W]`` int32 and their log-probabilities ``[B, W]``, minus infinity where
      nothing matches.
    """
    size = rnd.text.shape[1]

    def best_match(span: int) -> jax.Array:
        positions = jnp.arange(span)
        # A match may end anywhere before the newest committed token, so that its continuation
        # is committed too.
        running = (positions < rnd.length[:, None] - 1)[:, None, :]
        matched = jnp.zeros((*recent.shape[:2], span), jnp.int32)
        for back in range(recent.shape[2]):
            shifted = jnp.pad(rnd.text, ((0, 0), (back, 0)), constant_values=-2)[:, :span]
            running = running & (shifted[:, None, :] == recent[:, :, back, None])
            matched += running.astype(jnp.int32)
        return jnp.max(matched * size + positions, axis=-1)

    best = within(jnp.max(rnd.length), size, best_match)
    length, end = best // size, best % size
    log_prob = rnd.policy.match_log_prob[jnp.clip(length - 1, 0)]
    return at(rnd.text, end + 1), jnp.where(length > 0, log_prob, -jnp.inf)
