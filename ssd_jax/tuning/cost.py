"""How long a plan takes: passes measured alone, and what lies between them, fitted to runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from ssd_jax.costs import PassCosts, pass_costs
from ssd_jax.plan import WIDE, Capacities, Plan, prefill_passes
from ssd_jax.stack import Stack
from ssd_jax.tuning.logs import TextLog
from ssd_jax.tuning.replay import Walk

ORACLE_WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 128)
DRAFT_WIDTHS = (1, 2, 4, 8, 16, 32, 128)

#: What the time is made up of. The seconds of passes alone count too: between other work, with
#: cold caches, a pass takes longer than in a row of its like.
TERMS = (
    "pass alone",
    "round",  # planting, verifying, committing
    "draft pass",  # selecting, inserting
    "extension",  # a level of the n-gram stage
    "scored row",  # of any model: noise, warping, choosing
    "tree cell",  # nodes times nodes, in every step that looks at the whole tree
)


def measure_passes(stack: Stack, slots: int) -> PassCosts:
    """Time a pass of every stage at several widths, in turns (:func:`ssd_jax.costs.pass_seconds`).

    Args:
      stack: the stack.
      slots: of the cache, all but the newest filled: the length of a typical text.
    """
    widths = {
        name: [width for width in (DRAFT_WIDTHS if stage else ORACLE_WIDTHS) if width <= slots]
        for stage, name in enumerate(stack.models)
    }
    return pass_costs(stack.models, widths, slots=slots, repeats=5)


def paced(plan: Plan, costs: PassCosts) -> Plan:
    """A plan that adapts to what passes cost here."""
    oracle, *drafts = costs.seconds
    plain = costs.of(oracle, 1)
    rows = max(plan.width - 1, 1)
    # Of a noisy measurement a wider pass may come out the cheaper one.
    row_cost = max(costs.of(oracle, plan.width) - plain, 0.0) / rows / plain
    passes = zip(drafts, plan.drafts, strict=False)
    return plan.paced(row_cost, [costs.of(name, own.width) / plain for name, own in passes])


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Predicts seconds.

    Attributes:
      passes: measured alone.
      factors: seconds for each unit of :data:`TERMS`.
    """

    passes: PassCosts
    factors: tuple[float, ...]

    def seconds(self, plan: Plan, walk: Walk, log: TextLog) -> float:
        """Of one text, its prompt included."""
        return float(np.dot(self.factors, amounts(self.passes, plan, walk, log)))


def amounts(costs: PassCosts, plan: Plan, walk: Walk, log: TextLog) -> tuple[float, ...]:
    """How much of each of :data:`TERMS` a walk has."""
    capacities = Capacities.of(plan, 1)
    drafting = sum(walk.passes)
    steps = walk.rounds + drafting + walk.extensions
    made = (walk.rounds, *walk.passes)
    rows = sum(count * width for count, width in zip(made, capacities.widths, strict=True))
    alone = _passes_alone(costs, plan, walk, log)
    return (alone, walk.rounds, drafting, walk.extensions, rows, steps * capacities.nodes**2)


def _passes_alone(costs: PassCosts, plan: Plan, walk: Walk, log: TextLog) -> float:
    """Seconds that the passes of a walk take alone, those over the prompt among them."""
    names = list(costs.seconds)[: len(plan.drafts) + 1]
    widths = Capacities.of(plan, 1).widths
    wide, single = prefill_passes(log.start - 1, plan.chunk)
    made = (walk.rounds, *walk.passes)
    prefill = sum(
        wide * costs.of(name, WIDE * plan.chunk) + (single + more) * costs.of(name, plan.chunk)
        for name, more in zip(names, (0, *walk.caught_up), strict=True)
    )
    return prefill + sum(
        count * costs.of(name, width)
        for name, width, count in zip(names, widths, made, strict=True)
    )


def fit(samples: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """The factors that explain some runs best.

    Least squares of relative errors, no factor below zero: all subsets of the few unknowns are
    solved, and the best solution without a negative one is the constrained optimum.

    Args:
      samples: of each run its :func:`amounts`, and its seconds.
    """
    seconds = np.array([own for _, own in samples], float)
    features = np.array([own for own, _ in samples], float) / seconds[:, None]
    scale = np.maximum(features.max(axis=0), 1e-30)  # cells are many, rounds few
    features /= scale
    best, best_error = np.zeros(features.shape[1]), math.inf
    for size in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), size):
            columns = list(chosen)
            found = np.linalg.lstsq(features[:, columns], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.sum((features[:, columns] @ found - 1) ** 2))
            if found.min() >= 0 and error < best_error - 1e-12:
                best, best_error = np.zeros(features.shape[1]), error
                best[columns] = found
    return tuple((best / scale).tolist())
