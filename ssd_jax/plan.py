"""Plans: how much each stage drafts.

A :class:`Plan` is what a user writes, stores as JSON and passes to ``generate``. The engine
sees it as two things: :class:`Capacities`, static numbers that set array shapes, and
:class:`Policy`, a record of traced arrays. Plans that fit the same capacities share one
compiled program. Plain decoding, classical speculative decoding and the staged algorithm are
plans of the same engine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssd_jax.errors import PlanError

if TYPE_CHECKING:
    import jax

#: Plain decoding, the classical chain of one draft, and everything.
MODES = ("baseline", "speculative", "staged")
DEFAULT = "default"  # in place of a plan: the mode's own, whatever the tuner has found
WIDE = 4  # chunks in a pass over a long prompt
MAX_TRIGRAM_BRANCH = 8  # continuations kept for each trigram context on the device


def _check(record: object, name: str, low: float, high: float, *, whole: bool = True) -> None:
    value = getattr(record, name)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "an integer" if whole else "a number"
        raise PlanError(
            f"plan field {type(record).__name__}.{name} must be {what} "
            f"from {low:g} to {high:g}, not {value!r}"
        )


def _are_probabilities(values: Any) -> bool:
    """Whether these are some numbers between 0 and 1."""
    if not isinstance(values, tuple) or not values:
        return False
    return all(isinstance(p, float) and 0.0 < p < 1.0 for p in values)


# A draft below this share of the oracle's size costs next to nothing.
_TRIFLE = 0.03
# What a CPU's products of some kind of oracle cost in units of one plain step: a row beyond the
# first, and a pass of a draft of the oracle's own size. Measured, and where texts gained by it less
# than measured (docs/performance.md).
_CPU_COSTS = {
    "tiled": (0.03, 0.8),
    "untiled": (0.16, 2.0),
    "wide": (0.05, 1.0),
    "int8": (0.09, 1.7),
}


@dataclasses.dataclass(frozen=True)
class DraftPlan:
    """One model draft.

    Attributes:
      rounds: passes of this model for each time the stage above asks it to grow the tree.
      width: nodes evaluated in one pass.
      branch: children added below each evaluated node.
      threshold: a pass is made only while some open node is at least this probable (as a path
        below the root), 0 to 1.
      tau_greedy, tau_sampled: scores are divided by this before the softmax that values nodes;
        below 1 the draft counts as surer of itself than its probabilities say.
      prior_greedy, prior_sampled: weight, 0 to 1, of what the stage below said of a child beside
        what this draft says of it: the child's probability is the mean of both.
      cost: of one pass, in units of an oracle pass over one token. Drafting rests while it
        earns less than plain decoding; at 0 it is thought to be free.
    """

    rounds: int = 4
    width: int = 4
    branch: int = 3
    threshold: float = 0.15
    tau_greedy: float = 0.5
    tau_sampled: float = 0.7
    prior_greedy: float = 0.2
    prior_sampled: float = 0.0
    cost: float = 0.1

    def __post_init__(self):
        _check(self, "cost", 0.0, 100.0, whole=False)
        _check(self, "rounds", 0, 64)
        _check(self, "width", 1, 128)
        _check(self, "branch", 1, 64)
        _check(self, "threshold", 0.0, 1.0, whole=False)
        _check(self, "prior_greedy", 0.0, 1.0, whole=False)
        _check(self, "prior_sampled", 0.0, 1.0, whole=False)
        _check(self, "tau_greedy", 1e-3, 1e3, whole=False)
        _check(self, "tau_sampled", 1e-3, 1e3, whole=False)


@dataclasses.dataclass(frozen=True)
class NGramPlan:
    """The n-gram stage: Katz trigram and look-up in the text so far.

    Attributes:
      levels: how many times the leaves are extended each time.
      width: leaves extended at a time.
      branch: trigram continuations of each leaf; 0 turns the trigram off.
      match: longest context compared in the look-up; 0 turns the look-up off.
      match_prob: estimated probability that a look-up's token is right, by matched length
        (the last entry serves all longer ones).
      tau_greedy, tau_sampled: as for drafts.
    """

    levels: int = 3
    width: int = 4
    branch: int = 1
    match: int = 6
    match_prob: tuple[float, ...] = (0.15, 0.3, 0.5, 0.65, 0.75, 0.85)
    tau_greedy: float = 0.4
    tau_sampled: float = 0.6

    def __post_init__(self):
        _check(self, "levels", 0, 64)
        _check(self, "width", 1, 128)
        _check(self, "branch", 0, MAX_TRIGRAM_BRANCH)
        _check(self, "match", 0, 64)
        if not self.branch and not self.match:
            raise PlanError(
                "plan field NGramPlan has neither trigram (branch) nor look-up (match); "
                "leave the stage out with ngram null"
            )
        _check(self, "tau_greedy", 1e-3, 1e3, whole=False)
        _check(self, "tau_sampled", 1e-3, 1e3, whole=False)
        if not _are_probabilities(self.match_prob):
            raise PlanError("plan field NGramPlan.match_prob needs probabilities between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole stack's plan; see the module's text.

    Attributes:
      width: nodes the oracle evaluates in one pass, the root among them.
      drafts: one entry for each model draft in use, largest first (may be fewer than loaded).
      ngram: the n-gram stage, or ``None`` to leave it out.
      depth: deepest level of the tree.
      nodes: the tree's capacity below the root.
      floor: children whose path is less probable than this are not added.
      chunk: tokens evaluated at once when a cache catches up with the text; four times as many
        as long as a single prompt lacks them.
      narrower: widths below ``width``, ascending, of which the oracle may use one instead where
        more nodes are not worth their cost. Each is compiled apart; with 1 among them, rounds in
        which drafting rests are those of plain decoding, otherwise passes of ``width``.
      row_cost: of each node beyond the first in an oracle pass, in units of a pass over one.
    """

    width: int = 1
    drafts: tuple[DraftPlan, ...] = ()
    ngram: NGramPlan | None = None
    depth: int = 0
    nodes: int = 0
    floor: float = 1e-3
    chunk: int = 32
    narrower: tuple[int, ...] = ()
    row_cost: float = 0.0

    def __post_init__(self):
        _check(self, "width", 1, 512)
        _check(self, "depth", 0, 128)
        _check(self, "nodes", 0, 1024)
        _check(self, "chunk", 1, 1024)
        _check(self, "floor", 0.0, 1.0, whole=False)
        _check(self, "row_cost", 0.0, 100.0, whole=False)
        ladder: tuple[Any, ...] = (0, self.narrower, self.width)
        if isinstance(self.narrower, tuple):
            ladder = (0, *self.narrower, self.width)
        if any(type(w) is not int for w in ladder) or sorted(set(ladder)) != list(ladder):
            raise PlanError(
                f"plan field Plan.narrower must be ascending integers from 1 to below the width "
                f"({self.width}), not {self.narrower!r}"
            )
        if (self.drafts or self.ngram) and (self.depth < 1 or self.nodes < 1):
            raise PlanError("a plan with drafts needs depth and nodes of at least 1")

    @classmethod
    def baseline(cls) -> Plan:
        """Plain decoding: one token for each oracle pass."""
        return cls()

    @classmethod
    def speculative(cls, tokens: int = 4) -> Plan:
        """The classical chain (Leviathan et al. 2022): one draft, its best token each time."""
        # Width 2: after full acceptance the draft lacks two tokens, and takes both at once.
        draft = DraftPlan(rounds=tokens, width=2, branch=1, threshold=0.0, cost=0.0)
        return cls(width=tokens + 1, drafts=(draft,), depth=tokens, nodes=tokens, floor=0.0)

    @classmethod
    def staged(cls, drafts: int = 1, ngram: bool = True) -> Plan:
        """Tree drafting by every stage of the stack; without a trigram, by look-up alone.

        Chosen with the shipped trio on two CPU cores (``docs/decisions.md``): plans with wider
        trees accept more tokens a pass, narrower ones are sooner done with each.
        """
        return cls(
            width=20,
            drafts=(DraftPlan(),) * drafts,
            ngram=NGramPlan(branch=1 if ngram else 0),
            depth=12,
            nodes=64,
        )

    def on_cpu(
        self, shares: Sequence[float], products: str = "untiled", *, sampled: bool = False
    ) -> Plan:
        """This plan where every row of a pass costs: with the root alone to fall back on, and
        narrower and surer of each pass of a draft that is no trifle beside the oracle.

        The numbers are those of two oracles on two cores, one of 13M parameters with a draft a
        tenth its size, one of 131M with the same draft (``docs/performance.md``). Rows come by
        eights there, or of a tiled oracle by fives.

        Args:
          shares: size of each draft over the oracle's.
          products: the oracle's kind: ``int8``, ``tiled`` (:class:`~ssd_jax.gpt2.Tiles`), small
            without tiles (``untiled``), or too ``wide`` for them.
          sampled: whether texts are sampled. A tree then guesses half as many tokens, and where the
            draft is a trifle half as many nodes are worth looking at.
        """
        if max(shares, default=0.0) < _TRIFLE and products != "int8":
            plan = dataclasses.replace(self, width=8 if sampled else 16)
            return plan.trimmed().paced(0.025, [1.3 * share for share in shares])
        drafts = tuple(dataclasses.replace(d, rounds=3, threshold=0.5) for d in self.drafts)
        width = 5 if products == "tiled" else 8
        plan = dataclasses.replace(self, width=width, nodes=32, drafts=drafts)
        if plan.ngram is not None and products != "wide":  # of so few nodes few are its guesses
            few = dataclasses.replace(plan.ngram, levels=2, width=2)
            plan = dataclasses.replace(plan, ngram=few)
        row_cost, of_share = _CPU_COSTS[products]
        return plan.trimmed().paced(row_cost, [of_share * share for share in shares])

    def trimmed(self) -> Plan:
        """This plan without levels that its oracle cannot look at: a node is evaluated with all of
        its ancestors."""
        return dataclasses.replace(self, depth=min(self.depth, max(self.width - 1, 1)))

    def paced(self, row_cost: float, draft_costs: Sequence[float]) -> Plan:
        """This plan adapting to these costs: the oracle may look at the root alone, and
        drafting rests where it does not pay (:mod:`ssd_jax.pacing`).

        Args:
          row_cost: of each node beyond the first in an oracle pass.
          draft_costs: of a pass of each draft; both in units of an oracle pass over one token.
        """
        pairs = zip(self.drafts, draft_costs, strict=True)
        return dataclasses.replace(
            self,
            narrower=(1,) if self.width > 1 else (),
            row_cost=row_cost,
            drafts=tuple(dataclasses.replace(draft, cost=cost) for draft, cost in pairs),
        )

    def unpaced(self) -> Plan:
        """This plan without costs: it drafts in every round, for a pass of one width."""
        drafts = tuple(dataclasses.replace(draft, cost=0.0) for draft in self.drafts)
        return dataclasses.replace(self, narrower=(), row_cost=0.0, drafts=drafts)

    @classmethod
    def for_mode(cls, mode: str, drafts: int, ngram: bool) -> Plan:
        """The default plan of a mode for a stack with so many drafts."""
        if mode not in MODES:
            raise PlanError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
        if mode == "baseline":
            return cls.baseline()
        if mode == "staged":
            return cls.staged(drafts, ngram)
        if not drafts:
            raise PlanError("mode 'speculative' needs a draft model; load one, or use 'staged'")
        return cls.speculative()

    @property
    def uses_trigram(self) -> bool:
        """Whether the n-gram stage asks the trigram, not the text alone."""
        return self.ngram is not None and self.ngram.branch > 0

    def check_stack(self, drafts: int, ngram: bool) -> None:
        """Raise :class:`PlanError` if a stack with so many drafts cannot follow this plan."""
        if len(self.drafts) > drafts:
            raise PlanError(
                f"the plan uses {len(self.drafts)} drafts but the stack has {drafts}; "
                "load more drafts or take entries out of the plan"
            )
        if self.uses_trigram and not ngram:
            raise PlanError(
                "the plan uses the trigram but the stack has none; load ngram=, or set branch to 0"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Parse what :meth:`to_json` wrote.

        Raises:
          PlanError: not JSON, an unknown field, or a value out of range.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not valid JSON ({error}); write it anew") from None
        plan = dict(_fields(cls, fields, source))
        drafts = plan.get("drafts", ())
        if not isinstance(drafts, list | tuple):
            raise PlanError(f"{source}: drafts must be a list, not {drafts!r}")
        if isinstance(plan.get("narrower"), list):
            plan["narrower"] = tuple(plan["narrower"])
        plan["drafts"] = tuple(DraftPlan(**_fields(DraftPlan, d, source)) for d in drafts)
        if plan.get("ngram") is not None:
            ngram = dict(_fields(NGramPlan, plan["ngram"], source))
            if isinstance(ngram.get("match_prob"), list):
                ngram["match_prob"] = tuple(ngram["match_prob"])
            plan["ngram"] = NGramPlan(**ngram)
        return cls(**plan)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan file.

        Raises:
          PlanError: the file cannot be read or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan file {path}: {error}") from None
        return cls.from_json(text, str(path))


def _fields(record: type, given: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise PlanError(f"{source}: {record.__name__} must be an object, not {given!r}")
    known = {field.name for field in dataclasses.fields(record)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise PlanError(
            f"{source}: {record.__name__} has no field {unknown[0]!r}; known: {sorted(known)}"
        )
    return given


def prefill_passes(tokens: int, chunk: int) -> tuple[int, int]:
    """How many passes of four chunks and how many of one it takes to evaluate a single prompt."""
    return divmod(math.ceil(tokens / chunk), WIDE)


@dataclasses.dataclass(frozen=True)
class Capacities:
    """Static numbers: they set shapes, and a new set compiles a new program.

    Attributes:
      text: longest text (prompt and continuation) the buffers hold, in tokens.
      nodes: N, trunk included.
      trunk: K.
      depth: D, deepest tree level.
      chunk: tokens a pass when catching up, see :func:`prefill_passes`.
      widths: W of the oracle and of each draft.
      narrower: further widths of the oracle, ascending; of 1 are rounds that draft nothing.
      branches: children per node, for each draft.
      passes: most passes a round, for the oracle (1) and each draft.
      ngram: (width, branch, match) of the n-gram stage, or ``None``.
    """

    text: int
    nodes: int
    trunk: int
    depth: int
    chunk: int
    widths: tuple[int, ...]
    narrower: tuple[int, ...]
    branches: tuple[int, ...]
    passes: tuple[int, ...]
    ngram: tuple[int, int, int] | None

    @classmethod
    def of(cls, plan: Plan, text: int) -> Capacities:
        """The smallest capacities that hold a plan, for texts of up to ``text`` tokens."""
        # The whole trunk must fit the first pass of every draft.
        trunk = min((d.width for d in plan.drafts), default=1)
        passes, calls = [1], 1
        for draft in plan.drafts:
            passes.append(max(calls * draft.rounds, 1))
            calls *= draft.rounds + 1
        ngram = plan.ngram if plan.ngram is not None and plan.ngram.levels else None
        width = min(plan.width, plan.nodes + 1)
        return cls(
            text=text,
            nodes=trunk + plan.nodes,
            trunk=trunk,
            depth=plan.depth,
            chunk=plan.chunk,
            widths=(width, *(d.width for d in plan.drafts)),
            narrower=tuple(w for w in plan.narrower if w < width),
            branches=tuple(d.branch for d in plan.drafts),
            passes=tuple(passes),
            ngram=None if ngram is None else (ngram.width, ngram.branch, ngram.match),
        )

    @property
    def rests(self) -> bool:
        """Whether rounds of plain decoding are compiled too, for when drafting does not pay."""
        return 1 in self.narrower

    @property
    def ladder(self) -> tuple[int, ...]:
        """Widths that the oracle may look at a tree with, ascending."""
        return (*(width for width in self.narrower if width > 1), self.widths[0])

    def plain(self) -> Capacities:
        """Of the rounds that draft nothing."""
        return Capacities.of(Plan.baseline(), self.text)

    def prefill_rows(self, batch: int) -> int:
        """Tokens in the passes that begin a prefill: four chunks where a single prompt may fill
        them, since a row of a wide pass costs less; those of a batch are wide enough."""
        fills = batch == 1 and prefill_passes(self.text - 1, self.chunk)[0] > 0
        return self.chunk * (WIDE if fills else 1)

    def scratch(self, model: int) -> int:
        """Cache slots a model needs beyond the text: its blocks of one round, a chunk of
        catching up, or the rows rewritten on acceptance, whichever is most."""
        blocks = self.widths[model] * self.passes[model]
        if model == 0:
            blocks += self.depth + 1  # the last round's path moves down with the next block
        return max(blocks, self.chunk, self.trunk + self.depth + 1)

    def slots(self, model: int) -> int:
        """S, cache slots of a model."""
        return self.text + self.scratch(model)

    @property
    def buffer(self) -> int:
        """Length of the text buffer: a whole path may be written at the last position."""
        return self.text + self.depth + 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """The traced side of a plan. Values beyond the capacities act as the capacities.

    A pytree for JAX once ``ssd_jax.stages`` is imported: plans are read and command lines parsed
    without JAX, which takes a second to import.

    Attributes:
      width: ``[M]`` int32, of the oracle and each draft.
      rounds, branch: ``[M - 1]`` int32, of each draft.
      threshold: ``[M - 1]`` float32, natural log.
      prior: ``[M - 1, 2]`` float32, (greedy, sampled) of each draft.
      tau: ``[M, 2]`` float32, (greedy, sampled) of each draft and, last, the n-gram stage.
      levels, ngram_width, ngram_branch: int32, of the n-gram stage; without levels of no width.
      match_log_prob: ``[match]`` float32, by matched length from 1.
      depth: int32.
      floor: float32, natural log.
      row_cost: float32, of the oracle.
      draft_cost: ``[M - 1]`` float32, of a pass of each draft.
    """

    width: jax.Array
    rounds: jax.Array
    branch: jax.Array
    threshold: jax.Array
    prior: jax.Array
    tau: jax.Array
    levels: jax.Array
    ngram_width: jax.Array
    ngram_branch: jax.Array
    match_log_prob: jax.Array
    depth: jax.Array
    floor: jax.Array
    row_cost: jax.Array
    draft_cost: jax.Array

    @classmethod
    def of(cls, plan: Plan, match: int | None = None) -> Policy:
        """The policy of a plan; ``match`` is the capacity for matched lengths, if larger."""
        ngram = plan.ngram or NGramPlan(levels=0)
        match = ngram.match if match is None else match
        # Lengths beyond the plan's own last entry count as it does.
        probs = [ngram.match_prob[min(i, len(ngram.match_prob) - 1)] for i in range(match)]
        drafts = plan.drafts

        # Made on the host: JAX would compile a conversion for each.
        def ints(values) -> Any:
            return np.array(values, np.int32)

        def floats(values) -> Any:
            return np.array(values, np.float32)

        def logs(values) -> Any:
            with np.errstate(divide="ignore"):
                return np.log(floats(values))

        return cls(
            width=ints([plan.width, *(d.width for d in drafts)]),
            rounds=ints([d.rounds for d in drafts]),
            branch=ints([d.branch for d in drafts]),
            threshold=logs([d.threshold for d in drafts]),
            prior=floats([(d.prior_greedy, d.prior_sampled) for d in drafts]),
            tau=floats([(s.tau_greedy, s.tau_sampled) for s in (*drafts, ngram)]),
            levels=ints(ngram.levels),
            ngram_width=ints(ngram.width if ngram.levels else 0),
            ngram_branch=ints(ngram.branch),
            match_log_prob=logs(probs),
            depth=ints(plan.depth),
            floor=logs(plan.floor),
            row_cost=floats(plan.row_cost),
            draft_cost=floats([d.cost for d in drafts]),
        )
