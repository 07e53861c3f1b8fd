"""What a plan would have done with a logged text: the engine's tree policy in plain Python.

This mirrors :mod:`ssd_jax.stages` step by step (selection, staging, trunk and catching up,
acceptance), with the drafts' answers taken from the log. Values are summed in double precision,
so that only exact ties of single precision may fall the other way.

The oracle's width matters only after a tree has grown. One growth therefore serves all widths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from ssd_jax.errors import PlanError
from ssd_jax.ngram import NGramTables
from ssd_jax.plan import Plan
from ssd_jax.stages import EULER
from ssd_jax.tree import UNEXPANDED
from ssd_jax.tuning.logs import Context, TextLog

_RULED_OUT = -1e4  # as in the engine: a child stays in the tree, at this floor
_UNLISTED = -1e4  # what a draft says of a token that is not among its best
_NOWHERE = -math.inf


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a plan does with one text.

    Attributes:
      round_tokens: tokens committed in each round.
      passes: of each draft, when drafting.
      caught_up: of each draft, passes of a chunk that made up for a backlog, after the prompt's.
      extensions: times the n-gram stage extended the leaves by a level.
      answered, asked: nodes that drafts evaluated and whose distribution the log holds, and all
        that they evaluated.
    """

    round_tokens: tuple[int, ...]
    passes: tuple[int, ...]
    caught_up: tuple[int, ...]
    extensions: int
    answered: int
    asked: int

    @property
    def tokens(self) -> int:
        return sum(self.round_tokens)

    @property
    def rounds(self) -> int:
        return len(self.round_tokens)


class Replay:
    """Replays plans on some logs, remembering what plans have in common.

    Growths are remembered for the last plan only (plans that differ in the oracle's width follow
    each other in a search); answers of the n-gram stage for all.
    """

    def __init__(self, logs: Sequence[TextLog]):
        self.logs = logs
        self._ngrams = [_NGram(log) for log in logs]
        self._plan: Plan | None = None
        self._grown: list[dict[tuple, _Grown]] = []

    def walks(self, plan: Plan) -> list[Walk]:
        """One walk for each log, from the prompt's end to the text's.

        Raises:
          PlanError: the plan is paced, or its drafts' taus are not those of the logs.
        """
        if plan != plan.unpaced():
            raise PlanError(
                "a replay knows no rests and no narrower passes; replay Plan.unpaced() instead"
            )
        key = dataclasses.replace(plan, width=1)
        if key != self._plan:
            for log in self.logs:
                log.check_taus(plan)
            self._plan, self._grown = key, [{} for _ in self.logs]
        return [
            _walk(log, plan, ngram, grown)
            for log, ngram, grown in zip(self.logs, self._ngrams, self._grown, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _Grown:
    """A tree that was grown, as far as the text and its costs are concerned.

    Attributes:
      ranks: of each node along the text, its place among the nodes that the oracle would choose.
      evaluated: for each draft, how many of the nodes of that path, root first, it has evaluated.
      passes, extensions, answered, asked: see :class:`Walk`.
    """

    ranks: tuple[int, ...]
    evaluated: tuple[int, ...]
    passes: tuple[int, ...]
    extensions: int
    answered: int
    asked: int


def _walk(log: TextLog, plan: Plan, ngram: _NGram, grown: dict[tuple, _Grown]) -> Walk:
    trunk = min((draft.width for draft in plan.drafts), default=1)
    width = min(plan.width, plan.nodes + 1)
    length, seen = log.start, [0] * len(plan.drafts)
    rounds: list[int] = []
    passes, caught_up = [0] * len(seen), [0] * len(seen)
    extensions = answered = asked = 0
    while length < len(log.tokens):
        for draft in range(len(seen)):
            goal = min(length - 1, log.context[draft])
            if length - seen[draft] > trunk and seen[draft] < goal:
                if rounds:  # else it is the prompt
                    caught_up[draft] += math.ceil((goal - seen[draft]) / plan.chunk)
                seen[draft] = goal
        key = (length, *seen)
        if key not in grown:
            grown[key] = _Growth(log, plan, ngram, length, seen, trunk).run()
        tree = grown[key]
        accepted = sum(rank < width for rank in tree.ranks)
        count = min(accepted + 1, len(log.tokens) - length)
        for draft in range(len(seen)):
            if tree.passes[draft]:
                known = length - 1 + min(tree.evaluated[draft], accepted + 1)
                seen[draft] = max(min(known, length + count - 1), seen[draft])
            passes[draft] += tree.passes[draft]
        rounds.append(count)
        extensions += tree.extensions
        answered += tree.answered
        asked += tree.asked
        length += count
    return Walk(tuple(rounds), tuple(passes), tuple(caught_up), extensions, answered, asked)


class _Growth:
    """One round's tree. Node 0 is the root; the trunk before it only takes up room in the first
    pass of a draft that has not seen it. Fields are lists by node, as in the engine's tree."""

    def __init__(
        self,
        log: TextLog,
        plan: Plan,
        ngram: _NGram,
        length: int,
        seen: Sequence[int],
        trunk: int,
    ):
        self.log, self.plan, self.ngram, self.length = log, plan, ngram, length
        self.backlog = [length - 1 - known for known in seen]
        self.ready = [known >= length - trunk for known in seen]
        self.floor = math.log(plan.floor) if plan.floor > 0 else _NOWHERE
        self.token, self.parent, self.depth = [log.tokens[length - 1]], [-1], [0]
        self.log_prob, self.value, self.expanded = [0.0], [0.0], [UNEXPANDED]
        self.context: list[Context] = [(length, ())]
        self.children: list[dict[int, int]] = [{}]
        self.grows = [self._may_grow(0)]
        self.evaluated: list[set[int]] = [set() for _ in plan.drafts]
        self.passes = [0] * len(plan.drafts)
        self.extensions = self.answered = self.asked = 0

    def run(self) -> _Grown:
        self._grow(0)
        path, node = [], 0
        for token in self.log.tokens[self.length :]:
            if (node := self.children[node].get(token, -1)) < 0:
                break
            path.append(node)
        order = self._best(range(len(self.token)))
        place = {node: rank for rank, node in enumerate(order)}
        return _Grown(
            ranks=tuple(place[node] for node in path),
            evaluated=tuple(
                next((i for i, node in enumerate((0, *path)) if node not in own), len(path) + 1)
                for own in self.evaluated
            ),
            passes=tuple(self.passes),
            extensions=self.extensions,
            answered=self.answered,
            asked=self.asked,
        )

    def _grow(self, draft: int) -> None:
        """Draft ``draft`` (from 0) and all stages below it grow the tree."""
        if draft == len(self.plan.drafts):
            if self.plan.ngram is not None:
                self._grow_ngram()
            return
        own = self.plan.drafts[draft]
        threshold = math.log(own.threshold) if own.threshold > 0 else _NOWHERE
        self._grow(draft + 1)
        for _ in range(own.rounds):
            nodes = self._best(self._open(draft))
            lacking = 0 if self.passes[draft] else self._lacking(draft)
            if not lacking and (not nodes or self.value[nodes[0]] < threshold):
                break
            self._draft_pass(draft, nodes[: own.width - lacking])
            self._grow(draft + 1)

    def _lacking(self, draft: int) -> int:
        """Nodes of the trunk that a draft takes in its first pass, before the root."""
        if not self.ready[draft] or self.plan.depth < 1:
            return 0
        missing = range(self.length - 1 - self.backlog[draft], self.length - 1)
        end = min(self.log.limit - 2, self.log.context[draft])
        return sum(position < end for position in missing)

    def _open(self, draft: int) -> list[int]:
        if not self.ready[draft]:
            return []
        reach = self.log.context[draft] - self.length + 1  # depths whose position it can read
        seen = self.evaluated[draft]
        return [
            node
            for node, grows in enumerate(self.grows)
            if grows and node not in seen and self.depth[node] < reach
        ]

    def _draft_pass(self, draft: int, nodes: list[int]) -> None:
        stage, own = draft + 1, self.plan.drafts[draft]
        prior = own.prior_sampled if self.log.temperature else own.prior_greedy
        self.passes[draft] += 1
        self.evaluated[draft].update(nodes)
        ours = [node for node in nodes if self.expanded[node] > stage]
        answers = self.log.distributions[draft]
        known = [(node, answers[c]) for node in ours if (c := self.context[node]) in answers]
        self.asked += len(ours)
        self.answered += len(known)
        for node, answer in known:
            for token, child in self.children[node].items():
                said = answer.get(token, _UNLISTED)
                mean = _interpolated(said, self.log_prob[child], prior)
                self.log_prob[child] = max(mean if said > _NOWHERE else _RULED_OUT, _RULED_OUT)
        for node in range(1, len(self.token)):
            self.value[node] = self.value[self.parent[node]] + self.log_prob[node]
        for node, answer in known:
            for token, log_prob in list(answer.items())[: own.branch]:
                self._insert(node, token, log_prob)
        for node in ours:
            self.expanded[node] = stage

    def _grow_ngram(self) -> None:
        ngram = self.plan.ngram
        assert ngram is not None
        stage = len(self.log.distributions) + 1
        for _ in range(ngram.levels):
            self.extensions += 1
            leaves = [
                node
                for node, grows in enumerate(self.grows)
                if grows and self.expanded[node] == UNEXPANDED
            ]
            nodes = self._best(leaves)[: ngram.width]
            for node in nodes:
                recent = self._recent(node, max(ngram.match, 2))
                position = self.length + self.depth[node]
                for token, log_prob in self.ngram.propose(self.plan, self.length, position, recent):
                    self._insert(node, token, log_prob)
            for node in nodes:
                self.expanded[node] = stage

    def _recent(self, node: int, count: int) -> tuple[int, ...]:
        """The node's token and those before it, newest first, as far as the text reaches."""
        found = []
        while node > 0 and len(found) < count:
            found.append(self.token[node])
            node = self.parent[node]
        missing = count - len(found)
        if missing > 0:
            text = self.log.tokens[max(self.length - missing, 0) : self.length]
            found.extend(reversed(text))
        return tuple(found)

    def _best(self, nodes) -> list[int]:
        value = self.value
        return sorted(nodes, key=lambda node: (-value[node], node))

    def _insert(self, parent: int, token: int, log_prob: float) -> None:
        value = self.value[parent] + log_prob
        if value < self.floor or log_prob == _NOWHERE or token in self.children[parent]:
            return
        node = len(self.token)
        if node > self.plan.nodes:
            return
        self.children[parent][token] = node
        self.children.append({})
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.log_prob.append(log_prob)
        self.value.append(value)
        self.expanded.append(UNEXPANDED)
        self.context.append(self.log.below(self.context[parent], token))
        self.grows.append(self._may_grow(node))

    def _may_grow(self, node: int) -> bool:
        ended = node > 0 and self.token[node] in self.log.eos
        room = self.length + 1 + self.depth[node] < self.log.limit
        return room and not ended and self.depth[node] < self.plan.depth


class _NGram:
    """The n-gram stage's proposals, which need no log."""

    def __init__(self, log: TextLog):
        self.log = log
        self.ends: dict[int, list[int]] = {}
        for position, token in enumerate(log.tokens):
            self.ends.setdefault(token, []).append(position)
        self.matches: dict[tuple, tuple[int, int]] = {}
        self.rows: dict[tuple[int, int], tuple[list[int], list[float]]] = {}

    def propose(
        self, plan: Plan, length: int, position: int, recent: tuple[int, ...]
    ) -> list[tuple[int, float]]:
        """Tokens for ``position`` after ``recent`` (newest first), with their log-probabilities,
        in a round that begins with ``length`` tokens."""
        ngram = plan.ngram
        assert ngram is not None
        trigram = self._katz(plan, position, recent) if ngram.branch else []
        if not ngram.match:
            return trigram
        token, matched = self._look_up(length, recent[: ngram.match])
        if not matched:
            return trigram
        known = ngram.match_prob[min(matched, len(ngram.match_prob)) - 1]
        log_prob = math.log(known)
        if self.log.temperature:
            # It wins if the best of all other tokens, noise included, stays below its own.
            noise = float(self.log.noise[position - self.log.start, token])
            log_prob = max(-math.expm1(-log_prob) * math.exp(-noise), _RULED_OUT)
        # Where both propose a token, the better value counts.
        log_prob = max([log_prob, *(lp for other, lp in trigram if other == token)])
        return [(token, log_prob), *((other, lp) for other, lp in trigram if other != token)]

    def _look_up(self, length: int, recent: tuple[int, ...]) -> tuple[int, int]:
        """What followed the longest, latest earlier occurrence, and how long it is."""
        if (length, recent) in self.matches:
            return self.matches[length, recent]
        tokens, best, best_end = self.log.tokens, 0, -1
        newest = recent[0]
        for end in self.ends.get(newest, ()):
            if end >= length - 1:
                break
            matched = 1
            while matched < min(len(recent), end + 1) and tokens[end - matched] == recent[matched]:
                matched += 1
            if matched >= best:
                best, best_end = matched, end
        found = (tokens[best_end + 1] if best else -1, best)
        self.matches[length, recent] = found
        return found

    def _katz(self, plan: Plan, position: int, recent: tuple[int, ...]) -> list[tuple[int, float]]:
        assert plan.ngram is not None and self.log.tables is not None
        newest, *older = recent
        pair = (older[0] if older else -1, newest)
        if pair not in self.rows:
            self.rows[pair] = _look_up_pair(self.log.tables, *pair)
        tokens, log_probs = self.rows[pair]
        tokens, log_probs = tokens[: plan.ngram.branch], log_probs[: plan.ngram.branch]
        rest = math.log(max(1.0 - sum(map(math.exp, log_probs)), 1e-6))
        temperature, tau = self.log.temperature, plan.ngram.tau_greedy
        scores = [*log_probs, rest]
        if temperature:
            noise = self.log.noise[position - self.log.start]
            tau = plan.ngram.tau_sampled
            scores = [
                *(
                    lp / temperature + float(noise[t])
                    for t, lp in zip(tokens, log_probs, strict=True)
                ),
                rest / temperature + EULER,
            ]
        scores = [score / tau for score in scores]
        top = max(scores)
        total = top + math.log(sum(math.exp(score - top) for score in scores))
        return [(t, score - total) for t, score in zip(tokens, scores, strict=False)]


def _interpolated(said: float, before: float, prior: float) -> float:
    """The log of the mean of two probabilities, of which the second weighs ``prior``."""
    weighed = ((1 - prior, said), (prior, before))
    return float(np.logaddexp.reduce([math.log(w) + log_prob for w, log_prob in weighed if w]))


_rows_of = jax.jit(NGramTables.look_up)


def _look_up_pair(tables: NGramTables, a: int, b: int) -> tuple[list[int], list[float]]:
    tokens, log_probs = jax.device_get(_rows_of(tables, np.int32(a), np.int32(b)))
    return tokens.tolist(), log_probs.tolist()
