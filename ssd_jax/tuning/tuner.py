"""``tune``: measure, log, replay, search, confirm, keep."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssd_jax import tuned
from ssd_jax.batch import GenerationResult, Stats, bucket, generate_batch
from ssd_jax.errors import PromptError, SamplingError
from ssd_jax.generate import encode_prompt, resolve_plan
from ssd_jax.plan import DEFAULT, Plan
from ssd_jax.sampling import Sampling
from ssd_jax.stack import Stack
from ssd_jax.tuning import cost
from ssd_jax.tuning.cost import CostModel
from ssd_jax.tuning.logs import log_text
from ssd_jax.tuning.replay import Replay
from ssd_jax.tuning.search import Space, search

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 50}

Progress = Callable[[str, float], None]  # what is done, and the share of it that is over


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One plan, predicted and measured.

    Attributes:
      name: ``baseline``; ``wide``, ``narrow`` or ``chain``, which costs are fitted to; ``default``
        (this device's) or ``found 1`` ...
      plan: the plan, as it ran.
      predicted_speedup, speedup: over plain decoding, medians over the prompts. Predictions are
        of the unpaced plan; of plain decoding, or before the calibration was over, ``None``.
      predicted_tokens_per_pass, tokens_per_pass: over all prompts.
      coverage: share of the nodes the replay's drafts evaluated that the logs could answer for.
      kept: whether this is the plan that was stored.
    """

    name: str
    plan: Plan
    predicted_speedup: float | None
    speedup: float
    predicted_tokens_per_pass: float | None
    tokens_per_pass: float
    coverage: float | None
    kept: bool


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found.

    Attributes:
      tuned: the plans, and the costs of passes.
      rows: by kind of decoding, the plans that were compared.
      factors: by kind, seconds for each unit of :data:`ssd_jax.tuning.cost.TERMS`.
      searched: by kind, how many plans were replayed, not counting the oracle's widths.
      path: the file that keeps them; ``None`` if they were not to be saved, or nothing was found.
      interrupted: whether Ctrl-C ended it early.
    """

    tuned: tuned.Tuned
    rows: dict[str, list[TableRow]]
    factors: dict[str, tuple[float, ...]]
    searched: dict[str, int]
    path: Path | None
    interrupted: bool


def tune(
    stack: Stack,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 64,
    kinds: Sequence[str] = tuned.KINDS,
    sampling: dict[str, Any] | None = None,
    max_width: int = 48,
    search_seconds: float = 60.0,
    confirm: int = 3,
    repeats: int = 3,
    seed: int = 0,
    save: bool = True,
    on_progress: Progress | None = None,
) -> Tuning:
    """Find the fastest plans for this device and stack, and keep them for ``generate``.

    Ctrl-C during a search ends the search: what it has found so far is confirmed. At any other
    time it ends the tuning, and the best plan that was measured until then is kept.

    Args:
      stack: with at least one stage below the oracle to tune.
      prompts: to calibrate on, text or token ids; what ``generate`` will be asked for.
      max_new_tokens: of each prompt.
      kinds: of :data:`ssd_jax.tuned.KINDS`; each gets a plan of its own.
      sampling: temperature and so on of ``sampled``; default: T = 1, top-k 50.
      max_width: of the oracle's pass.
      search_seconds: for each kind.
      confirm: how many of the plans with the best predictions are run.
      repeats: runs of each prompt and plan.
      seed: of sampling and search.
      save: whether to keep what was found.
      on_progress: told of every step.

    Raises:
      PromptError: no prompt, or one that does not fit the context.
      SamplingError: an option out of range.
      OSError: the cache folder cannot be written.
    """
    if min(repeats, confirm, max_new_tokens) < 1:
        raise SamplingError("repeats, confirm and max_new_tokens must be at least 1")
    if max_width < 2:
        raise SamplingError(f"max_width must be at least 2, not {max_width}: 1 is plain decoding")
    options = {"greedy": {}, "sampled": SAMPLED if sampling is None else sampling}
    if not set(kinds) <= set(options) or not options["sampled"].get("temperature"):
        raise SamplingError("kinds are greedy and sampled; sampled needs a temperature above 0")
    bench = _Bench.of(stack, prompts, max_new_tokens, seed)
    if save:  # fails now rather than after minutes
        folder = tuned.path_for(stack).parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    say = on_progress or (lambda what, share: None)
    say("passes of each stage", 0.0)
    costs = cost.measure_passes(stack, bench.typical_length)
    found = Tuning(tuned.Tuned({}, {}, costs), {}, {}, {}, None, False)
    for kind in kinds:
        space = Space(len(stack.drafts), stack.ngram is not None, kind == "sampled", max_width)
        job = _Job(bench, kind, options[kind], costs, space, say)
        try:
            job.calibrate(repeats)
            job.search(search_seconds, seed)
            job.confirm(confirm, repeats)
        except KeyboardInterrupt:
            job.interrupted = True
        found = _added(found, stack, job, save)
        if job.interrupted:
            return replace(found, interrupted=True)
    return found


def _added(found: Tuning, stack: Stack, job: _Job, save: bool) -> Tuning:
    """With what a job found, kept in the cache folder if wanted."""
    rows = job.rows()
    if not rows:
        return found
    best = next(row for row in rows if row.kept)
    kept = replace(
        found.tuned,
        plans={**found.tuned.plans, job.kind: best.plan},
        speedups={**found.tuned.speedups, job.kind: best.speedup},
    )
    return replace(
        found,
        tuned=kept,
        rows={**found.rows, job.kind: rows},
        factors={**found.factors, job.kind: job.model.factors if job.model else ()},
        searched={**found.searched, job.kind: len(job.ranking)},
        path=tuned.save(stack, kept) if save else None,
    )


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Prompts, and runs of plans on them. All share one text capacity, so that every plan is
    compiled once."""

    stack: Stack
    prompts: list[list[int]]
    max_new_tokens: int
    seed: int
    capacity: int

    @classmethod
    def of(cls, stack: Stack, prompts, max_new_tokens: int, seed: int) -> _Bench:
        encoded = [encode_prompt(stack, prompt) for prompt in prompts]
        context = stack.oracle.config.n_positions
        usable = [tokens for tokens in encoded if len(tokens) < context]
        if not usable:
            raise PromptError("tuning needs at least one prompt that leaves room to write")
        longest = max(min(len(tokens) + max_new_tokens, context) for tokens in usable)
        return cls(stack, usable, max_new_tokens, seed, bucket(longest))

    @property
    def typical_length(self) -> int:
        lengths = [len(tokens) + self.max_new_tokens // 2 for tokens in self.prompts]
        return min(int(statistics.median(lengths)), self.capacity)

    def limit(self, index: int) -> int:
        wanted = len(self.prompts[index]) + self.max_new_tokens
        return min(wanted, self.stack.oracle.config.n_positions)

    def sampling(self, index: int, options: dict[str, Any]) -> Sampling:
        return Sampling.create(1, **options, seed=self.seed + index)

    def run(self, index: int, plan: Plan, options: dict[str, Any]) -> GenerationResult:
        """Decode a prompt; once more if that compiled."""

        def once() -> GenerationResult:
            return generate_batch(
                self.stack,
                [self.prompts[index]],
                self.max_new_tokens,
                self.sampling(index, options),
                plan,
                capacity=self.capacity,
            )[0]

        result = once()
        return once() if result.stats.compile_seconds > 0 else result


class _Job:
    """Tuning for one kind of decoding."""

    def __init__(self, bench: _Bench, kind: str, options, costs, space: Space, say: Progress):
        self.bench, self.kind, self.options = bench, kind, options
        self.costs, self.space = costs, space
        self.say: Progress = lambda what, share: say(f"{kind}: {what}", share)
        # Costs are fitted to plans unlike each other, so that the terms can be told apart.
        self.fitted = {"wide": space.wide(), "narrow": space.narrow()}
        if space.drafts:
            self.fitted["chain"] = Plan.speculative(4).unpaced()
        default, _ = resolve_plan(bench.stack, "staged", DEFAULT, sampled=kind != "greedy")
        self.plans = {"baseline": Plan.baseline(), "default": default} | self.fitted
        self.replay = Replay([])
        self.model: CostModel | None = None
        self.measured: dict[str, _Measured] = {}
        self.plain: list[float] = []  # seconds of each prompt in the runs that costs are fitted to
        self.latest: list[str] = []  # names of what was measured last, in the same turns
        self.ranking: list[tuple[float, Plan]] = []
        self.interrupted = False

    def calibrate(self, repeats: int) -> None:
        """Log the texts, run a few plans, fit the costs."""
        logs = []
        count = len(self.bench.prompts)
        for index, prompt in enumerate(self.bench.prompts):
            text = self.bench.run(index, Plan.baseline(), self.options).tokens
            log = log_text(
                self.bench.stack,
                [*prompt, *text],
                len(prompt),
                self.bench.limit(index),
                self.bench.sampling(index, self.options),
                capacity=self.bench.capacity,
                on_share=lambda share, done=index: self.say("logging", (done + share) / count),
            )
            logs.append(log)
        self.replay = Replay(logs)
        self._measure(list(self.plans), repeats, "calibration runs")
        samples = []
        for name, plan in self.fitted.items():
            runs = self.measured[name].seconds
            for log, walk, seconds in zip(logs, self.replay.walks(plan), runs, strict=True):
                samples.append((cost.amounts(self.costs, plan, walk, log), seconds))
        self.model = CostModel(self.costs, cost.fit(samples))
        self.plain = self.measured["baseline"].seconds
        if self.interrupted:
            raise KeyboardInterrupt

    def search(self, seconds: float, seed: int) -> None:
        try:
            for over, ranking in search(self.space, self._relative, seconds=seconds, seed=seed):
                self.ranking = ranking
                best = f"best predicted {1 / ranking[0][0]:.2f}x"
                self.say(f"{len(ranking)} plans tried, {best}", over)
        except KeyboardInterrupt:
            self.say("search interrupted, confirming what it found", 1.0)

    def confirm(self, count: int, repeats: int) -> None:
        """Run the plans with the best predictions, as they would be kept, against plain decoding
        and the default."""
        # Plans that differ in what trimming takes away are one.
        best = dict.fromkeys(cost.paced(p.trimmed(), self.costs) for _, p in self.ranking)
        fresh = [plan for plan in best if plan != self.plans["default"]][:count]
        found = {f"found {place}": plan for place, plan in enumerate(fresh, 1)}
        self.plans |= found
        self._measure(["baseline", "default", *found], repeats, "confirming")

    def rows(self) -> list[TableRow]:
        """All plans that were measured. Of the last ones, which took turns, the fastest is kept:
        the default and plain decoding are among them."""
        if not self.latest:
            return []
        speeds = {name: self.measured[name].speedup for name in self.latest}
        kept = max(self.latest, key=lambda name: (speeds[name], name == "default"))
        return [self._row(name, kept=name == kept) for name in self.measured]

    def _row(self, name: str, *, kept: bool) -> TableRow:
        plan, measured = self.plans[name], self.measured[name]
        figures = measured.speedup, measured.tokens_per_pass
        row = TableRow(name, plan, None, figures[0], None, figures[1], None, kept)
        if self.model is None or name == "baseline":
            return row
        walks = self.replay.walks(plan.unpaced())
        asked = sum(walk.asked for walk in walks)
        return replace(
            row,
            predicted_speedup=1 / statistics.median(self._relatives(plan.unpaced())),
            predicted_tokens_per_pass=sum(w.tokens for w in walks) / sum(w.rounds for w in walks),
            coverage=sum(walk.answered for walk in walks) / asked if asked else 1.0,
        )

    def _relatives(self, plan: Plan) -> list[float]:
        """Of each prompt, predicted seconds over those that plain decoding took."""
        assert self.model is not None
        walks = self.replay.walks(plan)
        return [
            self.model.seconds(plan, walk, log) / seconds
            for walk, log, seconds in zip(walks, self.replay.logs, self.plain, strict=True)
        ]

    def _relative(self, plan: Plan) -> float:
        return statistics.fmean(self._relatives(plan))

    def _measure(self, names: list[str], repeats: int, what: str) -> None:
        """Run plans in turns. Compilation comes first, so that the turns are alike. Where Ctrl-C
        cuts a turn over all prompts short, the turns before it count."""
        prompts = range(len(self.bench.prompts))
        total, done = len(names) * (1 + repeats * len(prompts)), 0

        def run(index: int, name: str, step: str) -> Stats:
            nonlocal done
            self.say(f"{what}{step}", done / total)
            done += 1
            return self.bench.run(index, self.plans[name], self.options).stats

        for name in names:
            run(0, name, f", compiling {name}")
        turns: list[dict[tuple[int, str], Stats]] = []
        try:
            for _ in range(repeats):
                pairs = itertools.product(prompts, names)
                turns.append({(index, name): run(index, name, "") for index, name in pairs})
        except KeyboardInterrupt:
            if not turns:
                raise
            self.interrupted = True
        runs = {name: [[turn[i, name] for turn in turns] for i in prompts] for name in names}
        plain = [_median_seconds(own) for own in runs["baseline"]]
        self.measured |= {name: _Measured.of(own, plain) for name, own in runs.items()}
        self.latest = names


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Runs of one plan.

    Attributes:
      seconds: of each prompt, the median of its runs.
      speedup: over plain decoding in the same turns, the median over the prompts.
      tokens_per_pass: over all prompts.
    """

    seconds: list[float]
    speedup: float
    tokens_per_pass: float

    @classmethod
    def of(cls, runs: list[list[Stats]], plain: list[float]) -> _Measured:
        seconds = [_median_seconds(own) for own in runs]
        ratios = [base / own for base, own in zip(plain, seconds, strict=True)]
        every = [stats for own in runs for stats in own]
        tokens, passes = sum(s.new_tokens for s in every), sum(s.rounds for s in every)
        return cls(seconds, statistics.median(ratios), tokens / passes)


def _median_seconds(runs: list[Stats]) -> float:
    return statistics.median(stats.seconds for stats in runs)
