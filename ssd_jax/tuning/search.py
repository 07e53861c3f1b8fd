"""The search for the plan that is predicted to be the fastest.

All plans here are unpaced: a replay knows no rests.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ssd_jax.plan import MAX_TRIGRAM_BRANCH, DraftPlan, NGramPlan, Plan
from ssd_jax.tuning.logs import DEPTH, LISTED

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, DEPTH)
NODES = (4, 8, 12, 16, 24, 32, 48, 64, 96)
FLOORS = (0.0, 1e-3, 1e-2)
DRAFT = {
    "rounds": (1, 2, 3, 4, 5, 6, 8),
    "width": (1, 2, 3, 4, 5, 6, 8, 10, 12, 16),
    "branch": (1, 2, 3, 4, 6, 8),
    "prior_greedy": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
    "prior_sampled": (0.0, 0.05, 0.1, 0.2),
    "threshold": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
}
NGRAM = {
    "levels": (0, 1, 2, 3, 4, 6),
    "width": (1, 2, 3, 4, 6, 8),
    "branch": (0, 1, 2, 3, 4),
    "match": (0, 1, 2, 3, 4, 6, 8),
}


@dataclasses.dataclass(frozen=True)
class Space:
    """What a plan may ask for.

    Attributes:
      drafts: models that the stack has for drafting.
      trigram: whether it has one.
      sampled: whether texts are sampled; a plan's settings for greedy ones then change nothing.
      max_width: of the oracle's pass.
    """

    drafts: int
    trigram: bool
    sampled: bool
    max_width: int = 48

    def allows(self, plan: Plan) -> bool:
        """Whether the stack can follow the plan and the logs can answer for it."""
        ngram = plan.ngram
        if len(plan.drafts) > self.drafts or plan.width > min(self.max_width, plan.nodes + 1):
            return False
        if ngram is not None and ngram.branch > (MAX_TRIGRAM_BRANCH if self.trigram else 0):
            return False
        return plan.depth <= DEPTH and all(draft.branch <= LISTED for draft in plan.drafts)

    def wide(self) -> Plan:
        """The default's tree."""
        return self._within(Plan.staged(self.drafts, self.trigram))

    def narrow(self) -> Plan:
        """A small tree, for devices where a row of a pass costs much."""
        return self._within(
            Plan(
                width=6,
                drafts=(DraftPlan(rounds=2, width=3, branch=2, threshold=0.2),) * self.drafts,
                ngram=NGramPlan(levels=2, width=2, branch=1 if self.trigram else 0),
                depth=8,
                nodes=16,
            )
        )

    def starts(self) -> list[Plan]:
        """Where the search begins: the default, a narrow tree, the n-gram alone, a chain."""
        wide = self.wide()
        found = [wide, self.narrow(), replace(wide, drafts=(), width=8, nodes=24, depth=8)]
        if self.drafts:
            found.append(Plan.speculative(3))
        return [plan for plan in map(self._within, found) if self.allows(plan)]

    def _within(self, plan: Plan) -> Plan:
        plan = plan.unpaced()
        return replace(plan, width=min(plan.width, self.max_width))

    def widths(self, plan: Plan) -> list[Plan]:
        """The plan with every width of the oracle's pass."""
        found = [replace(plan, width=width) for width in WIDTHS if width > 1]
        return [other for other in found if self.allows(other)]

    def neighbours(self, plan: Plan) -> list[Plan]:
        """Plans that differ in one thing other than the oracle's width."""
        found: list[Plan] = []
        for field, grid in (("depth", DEPTHS), ("nodes", NODES), ("floor", FLOORS)):
            found += [replace(plan, **{field: v}) for v in _beside(grid, getattr(plan, field))]
        idle = "prior_greedy" if self.sampled else "prior_sampled"
        for index, draft in enumerate(plan.drafts):
            for field, grid in DRAFT.items():
                for value in _beside(grid, getattr(draft, field)) if field != idle else ():
                    changed = replace(draft, **{field: value})
                    drafts = (*plan.drafts[:index], changed, *plan.drafts[index + 1 :])
                    found.append(replace(plan, drafts=drafts))
        ngram = plan.ngram
        if ngram is not None:
            for field, grid in NGRAM.items():
                for value in _beside(grid, getattr(ngram, field)):
                    sources = {"branch": ngram.branch, "match": ngram.match} | {field: value}
                    if sources["branch"] or sources["match"]:
                        found.append(replace(plan, ngram=replace(ngram, **{field: value})))
        found += self._parts(plan)
        within = (self._within(replace(p, width=min(p.width, p.nodes + 1))) for p in found)
        return [other for other in dict.fromkeys(within) if other != plan and self.allows(other)]

    def _parts(self, plan: Plan) -> Iterator[Plan]:
        """With a stage more or a stage less."""
        if plan.drafts and (plan.ngram or len(plan.drafts) > 1):
            yield replace(plan, drafts=plan.drafts[:-1])
        if len(plan.drafts) < self.drafts:
            yield replace(plan, drafts=(*plan.drafts, DraftPlan(rounds=2, width=3, branch=2)))
        if plan.ngram is None:
            yield replace(plan, ngram=NGramPlan(levels=2, branch=1 if self.trigram else 0))
        elif plan.drafts:
            yield replace(plan, ngram=None)


def _climb(options: list[Plan], width: int, predict: Callable[[Plan], float]) -> tuple[float, Plan]:
    """Seconds and plan at the foot of the slope that ``width`` lies on: with wider passes tokens
    grow ever more slowly and costs do not, so that there is one valley."""
    seconds = functools.cache(lambda place: predict(options[place]))
    place = min(range(len(options)), key=lambda place: abs(options[place].width - width))
    for step in (-1, 1):
        while 0 <= place + step < len(options) and seconds(place + step) < seconds(place):
            place += step
    return seconds(place), options[place]


def _seconds(pair: tuple[float, Plan]) -> float:
    return pair[0]


def _beside(grid: Sequence, value) -> list:
    """The two next values of a grid on either side."""
    below = [v for v in grid if v < value][-2:]
    return [*reversed(below), *[v for v in grid if v > value][:2]]


def search(
    space: Space, predict: Callable[[Plan], float], *, seconds: float, seed: int = 0
) -> Iterator[tuple[float, list[tuple[float, Plan]]]]:
    """Local search from every start, then from the best plans with some things changed at once.

    Args:
      space: what may be chosen.
      predict: seconds that a plan would take; cheap for plans that differ in width alone.
      seconds: how long to search; every start is tried in any case.
      seed: of the order in which neighbours are tried.

    Yields:
      The share of the time that is over, and for every growth (a plan but for the oracle's width)
      tried so far its best width and the seconds, best first: one list, which grows.
    """
    chance, started = random.Random(seed), time.monotonic()
    tried: dict[Plan, tuple[float, Plan]] = {}
    ranking: list[tuple[float, Plan]] = []

    def over() -> float:
        return min((time.monotonic() - started) / max(seconds, 1e-9), 1.0)

    def evaluate(plan: Plan) -> tuple[float, Plan]:
        growth = replace(plan, width=1)
        if growth not in tried:
            tried[growth] = _climb(space.widths(plan), plan.width, predict)
            bisect.insort(ranking, tried[growth], key=_seconds)
        return tried[growth]

    starts = space.starts()
    for plan in starts:
        evaluate(plan)
        yield over(), ranking
    for turn in itertools.count():
        if turn < len(starts):
            current = evaluate(starts[turn])
        else:
            current = ranking[chance.randrange(min(len(ranking), 8))]
            for _ in range(3):
                current = evaluate(chance.choice(space.neighbours(current[1])))
        better = current
        while better:
            current, better = better, None
            others = space.neighbours(current[1])
            chance.shuffle(others)
            for other in others:
                if over() >= 1:
                    return
                found = evaluate(other)
                yield over(), ranking
                if found[0] < current[0]:
                    better = found
                    break
