"""The compiled decode loop.

``decode`` is one ``jit`` around one ``lax.while_loop``. Its body, :func:`speculative_step`, is
one round of the algorithm: the drafts grow a tree, the oracle evaluates the best of it in one
pass, the path it agrees with is committed together with its own next token. Where drafting rests,
a loop inside it makes rounds of plain decoding (:func:`plain_step`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssd_jax import stages
from ssd_jax import tree as trees
from ssd_jax.carry import while_loop
from ssd_jax.kv_cache import KVCache, settle
from ssd_jax.ngram import NGramTables
from ssd_jax.pacing import AMONG, TRIAL, Pace, after_round, best_width
from ssd_jax.plan import Capacities, Policy
from ssd_jax.processors import History
from ssd_jax.sampling import Noise, Sampling, best_few, choose, take
from ssd_jax.stages import Round
from ssd_jax.tree import TokenTree, at

RUNNING, ENDED, LIMITED = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbs:
    """The oracle's log-probabilities at some positions ``...``: of its own distribution, before
    temperature, filters and noise.

    Attributes:
      chosen: ``[B, ...]`` float32, of the token that was chosen.
      top_token: ``[B, ..., A]`` int32, the most probable tokens, best first.
      top: ``[B, ..., A]`` float32, theirs.
    """

    chosen: jax.Array
    top_token: jax.Array
    top: jax.Array

    @classmethod
    def empty(cls, batch: int, positions: int, alternatives: int) -> LogProbs:
        """Nothing written yet, on the host."""
        shape = (batch, positions)
        fields: Any = dict(
            chosen=np.zeros(shape, np.float32),
            top_token=np.zeros((*shape, alternatives), np.int32),
            top=np.zeros((*shape, alternatives), np.float32),
        )
        return cls(**fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Written by the loop, never read by it; one write for all tokens of a round and one for the
    round itself.

    Attributes:
      tokens: ``[B, 2, S']`` int32, ``origin`` and the bits of ``margin``.
      rounds: ``[R, B + M + 1]`` int32, ``length``, ``passes`` and ``width``.
      log_probs: of each committed token, at ``[B, S']``; ``None`` keeps them out of the program.
    """

    tokens: jax.Array
    rounds: jax.Array
    log_probs: LogProbs | None = None

    @property
    def origin(self) -> jax.Array:
        """``[B, S']`` int32, the stage that proposed each committed token."""
        return self.tokens[:, 0]

    @property
    def margin(self) -> jax.Array:
        """``[B, S']`` float32, by how much the oracle's choice of each token won."""
        return self.tokens[:, 1].view(jnp.float32)

    @property
    def length(self) -> jax.Array:
        """``[R, B]`` int32, committed tokens at the start of each round."""
        return self.rounds[:, : self.tokens.shape[0]]

    @property
    def passes(self) -> jax.Array:
        """``[R, M]`` int32, passes of the oracle and each draft in each round."""
        return self.rounds[:, self.tokens.shape[0] : -1]

    @property
    def width(self) -> jax.Array:
        """``[R]`` int32, rows of the oracle's pass in each round."""
        return self.rounds[:, -1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one round hands to the next.

    Attributes:
      text: ``[B, S']`` int32, prompt and continuation; committed below ``length``.
      length: ``[B]`` int32. The newest committed token is in no model's cache.
      start: ``[B]`` int32, the length of the prompt.
      limit: ``[B]`` int32, the length at which a row must end.
      eos: ``[B, F]`` int32 end-of-text ids, padded with -1.
      finish: ``[B]`` int32, ``RUNNING``, ``ENDED`` (by an end-of-text token) or ``LIMITED``.
      caches: the oracle's and each draft's.
      rounds: int32, rounds made so far.
      pace: what drafting earned of late.
      trace: for the caller.
    """

    text: jax.Array
    length: jax.Array
    start: jax.Array
    limit: jax.Array
    eos: jax.Array
    finish: jax.Array
    caches: tuple[KVCache, ...]
    rounds: jax.Array
    pace: Pace
    trace: Trace


def init_state(
    models: tuple[Any, ...],
    text: np.ndarray,
    length: np.ndarray,
    limit: np.ndarray,
    eos: np.ndarray,
    capacities: Capacities,
    *,
    alternatives: int | None = None,
    caches: tuple[KVCache, ...] | None = None,
) -> DecodeState:
    """The state before the first round: the prompt is committed, the caches are empty.

    Args:
      models: the oracle and the drafts.
      text: ``[B, T]`` int32 prompts, at most ``capacities.text`` long.
      length: ``[B]`` int32 prompt lengths, at least 1.
      limit: ``[B]`` int32, at most ``capacities.text``.
      eos: ``[B, F]`` int32.
      capacities: see :class:`~ssd_jax.plan.Capacities`.
      alternatives: A, to have log-probabilities in the trace.
      caches: of an earlier state of the same capacities, settled, each less than ``length`` long,
        instead of empty ones.
    """
    batch = text.shape[0]
    buffer = (batch, capacities.buffer)
    # All but the caches is made on the host: JAX would compile a program for each array.
    host: Any = dict(
        text=np.pad(text, ((0, 0), (0, buffer[1] - text.shape[1]))),
        length=length,
        start=length.copy(),
        limit=limit,
        eos=eos,
        finish=np.where(length < limit, RUNNING, LIMITED).astype(np.int32),
        rounds=np.int32(0),
        pace=Pace.start(),
    )
    unknown = np.full(buffer, np.inf, np.float32)
    trace: Any = dict(
        tokens=np.stack([np.zeros(buffer, np.int32), unknown.view(np.int32)], axis=1),
        rounds=np.zeros((capacities.text, batch + len(models) + 1), np.int32),
        log_probs=None if alternatives is None else LogProbs.empty(*buffer, alternatives),
    )
    if caches is None:
        caches = tuple(m.init_cache(batch, capacities.slots(i)) for i, m in enumerate(models))
    host, trace = jax.device_put((host, trace))
    return DecodeState(caches=caches, trace=Trace(**trace), **host)


@partial(jax.jit, static_argnames="capacities", donate_argnames="state")
def decode(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    yield_at: jax.Array,
    *,
    capacities: Capacities,
) -> DecodeState:
    """Run rounds until every row has finished or reached ``yield_at``.

    Args:
      models: the oracle and the drafts, callables with the signature of
        :meth:`ssd_jax.gpt2.GPT2.__call__` that are pytrees and have ``config`` (with
        ``n_positions`` and ``vocab_size``) and ``init_cache``.
      tables: the n-gram stage, or ``None``.
      state: where to go on from; donated.
      sampling: how tokens are chosen.
      policy: how much is drafted.
      yield_at: ``[B]`` int32. The loop stops *between* rounds once every unfinished row is at
        least this long, so a run in chunks takes the same steps as one long run.
      capacities: static.
    """

    # Not carried, as no round changes it.
    fixed = dict(start=state.start, limit=state.limit, eos=state.eos)
    elsewhere: Any = dict.fromkeys(fixed)

    def unfinished(carry) -> jax.Array:
        state, _ = carry
        return jnp.any((state.finish == RUNNING) & (state.length < yield_at))

    def going_on(drafts: bool):
        def cond(carry) -> jax.Array:
            state = dataclasses.replace(carry[0], **fixed)
            same = speculates(state, capacities) == drafts
            return unfinished(carry) & same & ~trial_due(models, state, sampling, capacities)

        return cond

    def rounds(step):
        def body(carry):
            state, noise = carry
            state = dataclasses.replace(state, **fixed)
            noise = noise_ahead(models, state, sampling, capacities, noise)
            state, *_ = step(models, tables, state, sampling, policy, capacities, noise)
            return dataclasses.replace(state, **elsewhere), noise

        return body

    def in_turns(carry):
        state, noise = carry
        state = dataclasses.replace(state, **fixed)
        state = prepared(models, tables, state, sampling, policy, capacities)
        carry = dataclasses.replace(state, **elsewhere), noise
        state, noise = while_loop(going_on(True), rounds(speculative_step), carry)
        state, noise = while_loop(going_on(False), rounds(plain_step), (settled(state), noise))
        return expecting(state, capacities), noise

    state = prefill(models, tables, state, sampling, policy, capacities)
    noise = noise_ahead(models, state, sampling, capacities)
    body = in_turns if capacities.rests else rounds(speculative_step)
    state, _ = while_loop(unfinished, body, (dataclasses.replace(state, **elsewhere), noise))
    return settled(dataclasses.replace(state, **fixed))


def prefill(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    capacities: Capacities,
) -> DecodeState:
    """Bring the oracle's cache up to the root, once and for all: every round leaves it there.

    Arguments as for :func:`decode`. Drafts may fall behind, so that it is in the rounds that they
    catch up.
    """
    rnd = new_round(models, tables, state, sampling, policy, capacities)
    oracle, *drafts = settled(state).caches
    oracle, _ = stages.catch_up(rnd, 0, stages.prefill(rnd, 0, oracle), backlog=1)
    state = expecting(dataclasses.replace(state, caches=(oracle, *drafts)), capacities)
    if capacities.rests:
        return state
    return prepared(models, tables, state, sampling, policy, capacities)


def prepared(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    capacities: Capacities,
) -> DecodeState:
    """With the drafts ready to be asked: the first is tried if that is due, and all that will be
    asked have read most of a long text.

    Arguments as for :func:`decode`. Where drafting may rest, this comes before every round, or
    every run of rounds of one kind.
    """
    rnd = new_round(models, tables, state, sampling, policy, capacities)
    pace = state.pace
    if _tries(models, sampling, capacities):

        def trial(pace: Pace) -> Pace:
            foreseen = stages.foresight(rnd, 1, TRIAL, AMONG) / jnp.sum(rnd.active)
            # What is thought to be free may fail as often as it likes.
            return pace.tried(jnp.where(policy.draft_cost[0] > 0, foreseen, TRIAL))

        due = trial_due(models, state, sampling, capacities)
        pace = lax.cond(due, trial, lambda pace: pace, pace)
    rnd = dataclasses.replace(rnd, trusted=pace.trusted).for_drafts()
    oracle, *drafts = state.caches
    drafts = [stages.prefill(rnd, model, cache) for model, cache in enumerate(drafts, 1)]
    return dataclasses.replace(state, caches=(oracle, *drafts), pace=pace)


def expecting(state: DecodeState, capacities: Capacities) -> DecodeState:
    """With an oracle whose passes move what the round before accepted, of which there is nothing
    yet; a pass over the root alone has nothing to move."""
    oracle, *drafts = state.caches
    if capacities.widths[0] > 1:
        path = (state.length.shape[0], capacities.depth + 1)
        oracle = dataclasses.replace(oracle, pending=jnp.full(path, -1, jnp.int32))
    return dataclasses.replace(state, caches=(oracle, *drafts))


def settled(state: DecodeState) -> DecodeState:
    """With all that the oracle has evaluated of the text in its final slots."""
    return dataclasses.replace(state, caches=(settle(state.caches[0]), *state.caches[1:]))


def speculates(state: DecodeState, capacities: Capacities) -> jax.Array:
    """bool: the next round drafts, as drafting does not rest, there is room for more than the
    oracle's own token, and some stage is asked."""
    asked = state.pace.drafting & _roomy(state)
    return asked if capacities.ngram is not None else asked & state.pace.trusted


def trial_due(
    models: tuple[Any, ...], state: DecodeState, sampling: Sampling, capacities: Capacities
) -> jax.Array:
    """bool: :func:`prepared` will try the first draft; every running row has text enough for it."""
    if not _tries(models, sampling, capacities):
        return jnp.bool_(False)
    enough = (state.length > TRIAL) | (state.finish != RUNNING)
    return state.pace.trial_due & _roomy(state) & jnp.all(enough)


def _tries(models: tuple[Any, ...], sampling: Sampling, capacities: Capacities) -> bool:
    """Whether drafts are tried at all: not where processors may change what they say."""
    return capacities.rests and len(models) > 1 and sampling.processors is None


def _roomy(state: DecodeState) -> jax.Array:
    return jnp.any((state.finish == RUNNING) & (state.length + 1 < state.limit))


def plain_step(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    capacities: Capacities,
    noise: Noise | None = None,
) -> tuple[DecodeState, TokenTree, Verdict]:
    """One round of plain decoding, by an oracle that is settled; the drafts fall behind.

    Arguments and results as for :func:`speculative_step`.
    """
    oracle, *drafts = state.caches
    alone = dataclasses.replace(state, caches=(oracle,))
    plain = capacities.plain()
    after, tree, verdict = speculative_step(models[:1], None, alone, sampling, policy, plain, noise)
    after = dataclasses.replace(after, caches=(*after.caches, *drafts), pace=after.pace.rested())
    return after, tree, verdict


def speculative_step(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    capacities: Capacities,
    noise: Noise | None = None,
) -> tuple[DecodeState, TokenTree, Verdict]:
    """One round: catch up, draft a tree, verify it, commit the accepted path.

    Arguments as for :func:`decode`; can be called on its own, after :func:`prefill`. The noise of
    the positions ahead is drawn if not given.

    Returns:
      The new state, the tree that was drafted, and what became of it.
    """
    rnd = new_round(models, tables, state, sampling, policy, capacities, noise)
    caches, caught_up = _catch_up(rnd, state)
    tree, drafts = stages.grow(rnd, 1, plant(rnd, caches[1:]), caches[1:])
    verdict, oracle = _verify(rnd, tree, caches[0], state)
    emitted = _emit(state, tree, verdict)
    return _advance(rnd, state, tree, (oracle, *drafts), caught_up, verdict, emitted), tree, verdict


def new_round(
    models: tuple[Any, ...],
    tables: NGramTables | None,
    state: DecodeState,
    sampling: Sampling,
    policy: Policy,
    capacities: Capacities,
    noise: Noise | None = None,
) -> Round:
    """What the stages look at in the round that follows ``state``. Noise is drawn if not given."""
    history = None
    if sampling.processors is not None:
        vocab = models[0].config.vocab_size
        text = (state.text, state.start, state.length)
        history = History.of(sampling.processors, *text, vocab_size=vocab)
    return Round(
        models=models,
        tables=tables,
        text=state.text,
        length=state.length,
        start=state.start,
        limit=state.limit,
        active=state.finish == RUNNING,
        drafting=state.pace.drafting,
        trusted=state.pace.trusted,
        eos=state.eos,
        noise=noise or noise_ahead(models, state, sampling, capacities),
        history=history,
        sampling=sampling,
        policy=policy,
        capacities=capacities,
    )


def noise_ahead(
    models: tuple[Any, ...],
    state: DecodeState,
    sampling: Sampling,
    capacities: Capacities,
    noise: Noise | None = None,
) -> Noise | None:
    """The noise of every position that the next round may fill, going on from that of the last;
    ``None`` if all rows are greedy."""
    if sampling.draw is None:
        return None
    if noise is None:
        vocab = models[0].config.vocab_size
        noise = Noise.undrawn(state.length.shape[0], capacities.depth + 1, vocab)
    return noise.drawn(sampling.draw, state.length)


def _catch_up(rnd: Round, state: DecodeState) -> tuple[tuple[KVCache, ...], jax.Array]:
    """Bring every draft's cache up to the trunk, which its first pass takes whole, unless it is
    not asked. Passes made in the first round are the prefill and do not count."""
    rnd = rnd.for_drafts()
    caches, passes = list(state.caches), [jnp.int32(0)]
    for draft in range(1, len(caches)):
        caches[draft], made = stages.catch_up(rnd, draft, caches[draft], rnd.capacities.trunk)
        passes.append(made)
    return tuple(caches), jnp.where(state.rounds == 0, 0, jnp.stack(passes))


def plant(rnd: Round, caches: tuple[KVCache, ...]) -> TokenTree:
    """A tree with the newest committed tokens, of which the drafts' ``caches`` have some."""
    size = rnd.capacities.trunk
    depth = jnp.arange(size)[None] - (size - 1)
    trunk = at(rnd.text, rnd.position(depth))
    cached = tuple(cache.length for cache in caches)
    growable = rnd.growable(trunk, depth)
    levels = jnp.where(rnd.drafting, rnd.policy.levels, 0)
    return trees.plant(trunk, rnd.length, rnd.capacities.nodes, growable, cached, levels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the oracle made of a tree.

    Attributes:
      evaluated: ``[B, N]`` bool, nodes that were in its pass.
      path: ``[B, D + 1]`` int32 accepted nodes, root first.
      accepted: ``[B]`` int32, nodes below the root on it.
      token: ``[B, D + 1]`` int32, the oracle's choice after each node of the path: these are
        the next tokens of the text, the last one (at index ``accepted``) its own.
      margin: ``[B, D + 1]`` float32, by how much each choice won.
      slot: ``[B, D + 1]`` int32, where the path lies in the oracle's cache.
      rows: int32, width of the oracle's pass.
      log_probs: of these choices, at ``[B, D + 1]``, if the trace wants them.
    """

    evaluated: jax.Array
    path: jax.Array
    accepted: jax.Array
    token: jax.Array
    margin: jax.Array
    slot: jax.Array
    rows: jax.Array
    log_probs: LogProbs | None


def _verify(
    rnd: Round, tree: TokenTree, cache: KVCache, state: DecodeState
) -> tuple[Verdict, KVCache]:
    """One oracle pass over the best nodes of the tree."""
    width = rnd.capacities.widths[0]
    eligible = tree.valid & (tree.depth >= 0)
    nodes, found = trees.best_nodes(tree.value, eligible, width, rnd.policy.width[0])
    first = cache.length + (0 if cache.pending is None else cache.pending.shape[1])
    wanted = state.trace.log_probs
    if len(widths := rnd.capacities.ladder) > 1:
        chances = jnp.where(found & rnd.active[:, None], jnp.exp(at(tree.value, nodes)), 0.0)
        active = jnp.maximum(jnp.sum(rnd.active), 1).astype(jnp.float32)
        gain = jnp.sum(chances, axis=0) / active
        index = best_width(state.pace, gain, widths, rnd.policy.row_cost)
        choice, cache = _decide_any(
            rnd, tree, cache, nodes, found, widths, index, keep_logits=wanted is not None
        )
        rows = jnp.asarray(widths)[index]
    else:
        choice, cache = _decide(rnd, tree, cache, nodes, found, keep_logits=wanted is not None)
        rows = jnp.int32(width)
    token, margin, *logits = choice
    limit = jnp.minimum(rnd.policy.width[0], rows)
    row, evaluated = trees.rows_of_best(tree.value, eligible, width, limit)
    root = rnd.capacities.trunk - 1
    path, accepted = trees.accepted_path(
        tree, evaluated, at(token, row), root, rnd.capacities.depth
    )
    on_path = at(row, path)
    verdict = Verdict(
        evaluated=evaluated,
        path=path,
        accepted=accepted,
        token=at(token, on_path),
        margin=at(margin, on_path),
        slot=first[:, None] + on_path,
        rows=rows,
        log_probs=None,
    )
    if wanted is not None:
        chances = _log_probs(logits[0], on_path, verdict.token, wanted.top.shape[-1])
        verdict = dataclasses.replace(verdict, log_probs=chances)
    return verdict, cache


def _log_probs(logits: jax.Array, rows: jax.Array, token: jax.Array, alternatives: int) -> LogProbs:
    """Of ``token`` ``[B, P]`` and its best alternatives, by ``rows`` ``[B, P]`` of ``logits``."""
    logits = take(logits, rows[:, :, None], axis=1)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = take(logits, token[:, :, None], axis=2)
    top, top_token = best_few(logits, alternatives)
    return LogProbs(chosen[:, :, 0] - total, top_token, top - total[:, :, None])


def _decide(
    rnd: Round,
    tree: TokenTree,
    cache: KVCache,
    nodes: jax.Array,
    found: jax.Array,
    *,
    keep_logits: bool,
) -> tuple[tuple[jax.Array, ...], KVCache]:
    """The oracle's tokens after some nodes ``[B, W]`` and their margins, with its logits
    ``[B, W, V]`` if they are to be kept; and its cache."""
    if rnd.capacities.widths[0] == 1:
        logits, cache = _evaluate_root(rnd, cache)
    else:
        logits, cache = _evaluate_tree(rnd, tree, cache, nodes, found)
    scored = stages.processed(rnd, tree, nodes, logits)
    choice = choose(scored, rnd.noise, rnd.noise_after(tree, nodes), rnd.sampling.draw)
    return (*choice, logits) if keep_logits else choice, cache


def _decide_any(
    rnd: Round,
    tree: TokenTree,
    cache: KVCache,
    nodes: jax.Array,
    found: jax.Array,
    widths: tuple[int, ...],
    index: jax.Array,
    *,
    keep_logits: bool,
) -> tuple[tuple[jax.Array, ...], KVCache]:
    """:func:`_decide` for the best ``widths[index]`` nodes; what lies beyond is arbitrary."""
    choice = (jnp.zeros(nodes.shape, jnp.int32), jnp.zeros(nodes.shape))
    if keep_logits:
        choice += (jnp.zeros((*nodes.shape, rnd.models[0].config.vocab_size)),)
    carry = (index, choice, cache)
    # A chain of loops of at most one turn: lax.switch would copy every cache in every branch.
    for this, width in enumerate(widths):

        def turn(carry, width=width):
            _, choice, cache = carry
            nodes_now, found_now = nodes[:, :width], found[:, :width]
            made, cache = _decide(rnd, tree, cache, nodes_now, found_now, keep_logits=keep_logits)
            choice = tuple(
                lax.dynamic_update_slice(old, new, (0,) * old.ndim)
                for old, new in zip(choice, made, strict=True)
            )
            return jnp.int32(-1), choice, cache

        carry = lax.while_loop(lambda carry, this=this: carry[0] == this, turn, carry)
    return carry[1:]


def _evaluate_tree(
    rnd: Round, tree: TokenTree, cache: KVCache, nodes: jax.Array, found: jax.Array
) -> tuple[jax.Array, KVCache]:
    """A pass over some nodes, each attending to the text and its own ancestors. The path that
    the last round accepted moves to its final slots, the block follows behind room for it.

    Returns:
      Logits ``[B, W, V]`` and the cache.
    """
    assert cache.pending is not None
    first = cache.length + cache.pending.shape[1]
    among = trees.lineage_among(tree, nodes) & found[:, None, :]
    slots = jnp.arange(cache.slots)
    index = slots - first[:, None]
    own = take(among, jnp.clip(index, 0, nodes.shape[1] - 1)[:, None, :], axis=2)
    own &= ((index >= 0) & (index < nodes.shape[1]))[:, None, :]
    position = jnp.clip(
        rnd.position(at(tree.depth, nodes)), 0, rnd.models[0].config.n_positions - 1
    )
    logits, cache = stages.forward(
        rnd,
        0,
        at(tree.token, nodes),
        position,
        mask=own | (slots + 1 < rnd.length[:, None])[:, None, :],
        cache=cache,
        offset=cache.length,
    )
    return logits, dataclasses.replace(cache, length=rnd.length - 1)


def _evaluate_root(rnd: Round, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Plain decoding's pass: the root goes straight to its final slot, nothing is moved."""
    position = rnd.length[:, None] - 1
    slots = jnp.arange(cache.slots)
    return stages.forward(
        rnd,
        0,
        at(rnd.text, position),
        position,
        mask=slots <= position[:, :, None],
        cache=cache,
        offset=cache.length,
    )


@dataclasses.dataclass(frozen=True)
class Emitted:
    """How much of a verdict enters the text.

    Attributes:
      count: ``[B]`` int32 tokens, 0 for finished rows.
      finish: ``[B]`` int32, the rows' new status.
      origin: ``[B, D + 1]`` int32, who proposed each token.
    """

    count: jax.Array
    finish: jax.Array
    origin: jax.Array


def _emit(state: DecodeState, tree: TokenTree, verdict: Verdict) -> Emitted:
    """Cut the accepted path at an end-of-text token and at the limit."""
    index = jnp.arange(verdict.token.shape[1])
    within = index <= verdict.accepted[:, None]
    ends = within & jnp.any(verdict.token[:, :, None] == state.eos[:, None, :], axis=-1)
    first_end = jnp.min(jnp.where(ends, index, index.shape[0]), axis=-1)
    running = state.finish == RUNNING
    count = jnp.minimum(verdict.accepted, first_end) + 1
    count = jnp.where(running, jnp.minimum(count, state.limit - state.length), 0)
    finish = jnp.where(state.length + count >= state.limit, LIMITED, RUNNING)
    finish = jnp.where(first_end < count, ENDED, finish)
    below = jnp.pad(at(tree.origin, verdict.path[:, 1:]), ((0, 0), (0, 1)))
    return Emitted(
        count=count,
        finish=jnp.where(running, finish, state.finish).astype(jnp.int32),
        origin=jnp.where(index < verdict.accepted[:, None], below, 0),
    )


def _advance(
    rnd: Round,
    state: DecodeState,
    tree: TokenTree,
    caches: tuple[KVCache, ...],
    caught_up: jax.Array,
    verdict: Verdict,
    emitted: Emitted,
) -> DecodeState:
    """Commit text and caches, write the trace."""
    length = state.length + emitted.count
    trunk = rnd.capacities.trunk
    known = trunk + verdict.accepted
    batch = state.length.shape[0]
    path = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(trunk), (batch, trunk)), verdict.path[:, 1:]], axis=1
    )
    oracle, *drafts = caches
    if oracle.pending is None:
        oracle = dataclasses.replace(oracle, length=length - 1)
    else:
        real = jnp.arange(verdict.slot.shape[1]) < emitted.count[:, None]
        oracle = dataclasses.replace(oracle, pending=jnp.where(real, verdict.slot, -1))
    drafts = [
        stages.commit(rnd, cache, tree.slot(i), path, known, length)
        for i, cache in enumerate(drafts, 1)
    ]
    made = jnp.stack([jnp.int32(1), *(tree.passes(i) for i in range(1, len(caches)))])
    passes = caught_up + made
    others = state.trace.passes.shape[1] - passes.shape[0]  # models that take no part
    tokens = jnp.stack([emitted.origin, verdict.margin.view(jnp.int32)], axis=1)
    entry = jnp.concatenate([state.length, jnp.pad(passes, (0, others)), verdict.rows[None]])
    trace = Trace(
        tokens=_write(state.trace.tokens, tokens, state.length),
        rounds=lax.dynamic_update_index_in_dim(state.trace.rounds, entry, state.rounds, 0),
        log_probs=jax.tree.map(
            lambda buffer, row: _write(buffer, row, state.length, axis=1),
            state.trace.log_probs,
            verdict.log_probs,
        ),
    )
    return dataclasses.replace(
        state,
        text=_write(state.text, verdict.token, state.length),
        length=length,
        finish=emitted.finish,
        caches=(oracle, *drafts),
        rounds=state.rounds + 1,
        pace=_keep_pace(rnd, state.pace, emitted, verdict, made, caught_up),
        trace=trace,
    )


def _keep_pace(
    rnd: Round,
    pace: Pace,
    emitted: Emitted,
    verdict: Verdict,
    made: jax.Array,
    caught_up: jax.Array,
) -> Pace:
    """The pace after this round, with ``made`` passes and ``caught_up`` more, both ``[M]``."""
    if len(rnd.models) == 1 and rnd.capacities.ngram is None:
        return pace  # nothing drafts
    # A pass that catches up is as much wider as its chunk is.
    wider = np.array([rnd.capacities.chunk / width for width in rnd.capacities.widths], np.float32)
    passes = made.astype(jnp.float32) + caught_up.astype(jnp.float32) * wider
    committed = jnp.sum(emitted.count) / jnp.maximum(jnp.sum(rnd.active), 1)
    drafted = jnp.sum(passes[1:] * rnd.policy.draft_cost)
    looked_at = rnd.policy.row_cost * (verdict.rows - 1).astype(jnp.float32)
    return after_round(pace, committed, 1 + looked_at + drafted)


def _write(buffer: jax.Array, row: jax.Array, offset: jax.Array, axis: int = -1) -> jax.Array:
    """Write ``row[b]`` into ``buffer[b]``, along an axis from ``offset[b]`` on. Entries past
    what was emitted land above the new length, where the next round overwrites them."""
    for b in range(buffer.shape[0]):
        start: list[Any] = [b, *(buffer.ndim - 1) * (0,)]
        start[axis] = offset[b]
        buffer = lax.dynamic_update_slice(buffer, row[b : b + 1], start)
    return buffer
