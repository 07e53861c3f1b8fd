"""What each part of the algorithm is worth: variants of the plan, measured side by side.

Every variant writes the text that plain decoding writes; the rows count how many do. Most are
plans of the engine. What no plan can say, because the engine always ranks nodes by their
perturbed path probability, is put to the reference in :mod:`ssd_jax.benchmark.schemes`: trees
of one shape whatever the probabilities, and values that are blind to the noise. (A large tau
comes close to the first: all nodes of a depth are then worth about the same, and the tree fills
level by level; but which of them are expanded still depends on the probabilities, and the tree
is far wider than deep.) The reference's rows have neither seconds nor bandwidth, and no n-gram;
its trees by value are the engine's idea in the same terms.

No variant rests or narrows its passes, so that each draws on all of its parts in every round: what
that run-time adaptation is worth is a variant of its own.

Most of the time goes into compilation: one program for each plan and capacity of the text, so
prompts of similar length are measured soonest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ssd_jax.benchmark import schemes
from ssd_jax.benchmark.measure import clocked
from ssd_jax.benchmark.schemes import Scheme
from ssd_jax.generate import encode_prompt, generate, resolve_plan
from ssd_jax.plan import DEFAULT, Plan
from ssd_jax.stack import Stack

WIDTHS = (4, 8, 12, 16, 20, 24, 32, 48, 64)
CHAINS = (2, 4, 8)
ROUNDS = (1, 2, 4, 6, 8)
BRANCHES = (1, 2, 3, 4, 6)
THRESHOLDS = (0.0, 0.05, 0.15, 0.3, 0.5)
FIGURES = (
    "tokens per oracle pass",
    "relative bandwidth",
    "draft passes per oracle pass",
    "speed",
    "identical",
)

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
      group: what is varied.
      name: how.
      how: a plan for the engine, a scheme for the reference, or, in words, why this stack has
        neither.
    """

    group: str
    name: str
    how: Plan | Scheme | str


BASELINE = Variant("shape", "plain decoding", Plan.baseline())


def variants(stack: Stack) -> list[Variant]:
    """The variants of the staged plan; ``BASELINE`` is not among them."""
    plan = Plan.staged(len(stack.drafts), stack.ngram is not None).unpaced()
    default, _ = resolve_plan(stack, "staged", DEFAULT, sampled=False)
    found = [
        Variant("shape", "staged tree", plan),
        Variant("adaptation", "none", default.unpaced()),
        Variant("adaptation", "rests and narrower passes (default)", default),
    ]
    if stack.drafts:
        found += _model_variants(plan)
    found += _ngram_variants(stack, plan)
    found += _second_draft(stack, plan)
    found += [Variant("oracle's width", str(width), _wide(plan, width)) for width in WIDTHS]
    if stack.drafts:
        found += _draft_settings(plan)
        found += _references()
    return found


def _model_variants(plan: Plan) -> list[Variant]:
    """Chains and trees of the model drafts; staged and not."""
    alone, drafts = replace(plan, ngram=None), plan.drafts
    longer = replace(alone, drafts=tuple(replace(d, rounds=12, threshold=0.05) for d in drafts))
    level = tuple(
        replace(d, width=5, threshold=0.0, tau_greedy=1e3, tau_sampled=1e3) for d in drafts
    )
    return [
        *(Variant("shape", f"chain of {n}", Plan.speculative(n).unpaced()) for n in CHAINS),
        Variant("shape", "tree", alone),
        Variant("shape", "tree, level by level", replace(alone, drafts=level, floor=0.0)),
        Variant("staging", "plain draft", alone),
        Variant("staging", "plain draft, as long as it pays", longer),
        Variant("staging", "staged draft", plan),
    ]


def _ngram_variants(stack: Stack, plan: Plan) -> list[Variant]:
    """The n-gram stage, with and without each of its sources."""
    assert plan.ngram is not None
    group = "n-gram stage"
    look_up = replace(plan.ngram, branch=0)
    found = [
        Variant(group, "none", replace(plan, ngram=None)) if stack.drafts else None,
        Variant(group, "look-up in the text", replace(plan, ngram=look_up)),
    ]
    if stack.ngram is None:
        found.append(Variant(group, "trigram", "the stack has no trigram"))
    else:
        trigram = replace(plan.ngram, match=0)
        found += [
            Variant(group, "trigram", replace(plan, ngram=trigram)),
            Variant(group, "trigram and look-up", plan),
        ]
    if stack.drafts:
        # Without a draft's passes in between, the tree has to be grown at one go.
        ngram = replace(plan.ngram, levels=plan.depth)
        found.append(Variant(group, "all, no draft", replace(plan, drafts=(), ngram=ngram)))
    return [variant for variant in found if variant is not None]


def _second_draft(stack: Stack, plan: Plan) -> list[Variant]:
    if len(stack.drafts) < 2:
        return [Variant("drafts", "two", f"of model drafts the stack has {len(stack.drafts)}")]
    return [
        Variant("drafts", "the first", replace(plan, drafts=plan.drafts[:1])),
        Variant("drafts", "the first two", replace(plan, drafts=plan.drafts[:2])),
    ]


def _wide(plan: Plan, width: int) -> Plan:
    """A plan of another oracle width. The stages propose what they did; a wide tree only
    leaves less of it out."""
    return replace(plan, width=width, nodes=max(plan.nodes, 2 * width))


def _draft_settings(plan: Plan) -> list[Variant]:
    """How much the drafts do."""

    def drafts(**fields) -> Plan:
        return replace(plan, drafts=tuple(replace(d, **fields) for d in plan.drafts))

    return [
        *(Variant("draft's rounds", str(r), drafts(rounds=r)) for r in ROUNDS),
        *(Variant("draft's branches", str(b), drafts(branch=b)) for b in BRANCHES),
        *(Variant("draft's threshold", str(t), drafts(threshold=t)) for t in THRESHOLDS),
    ]


def _references() -> list[Variant]:
    """Trees of the first draft, as large as the oracle's pass, in the reference."""
    group = f"{schemes.NODES} nodes, reference"
    shape = schemes.best_shape(schemes.NODES, schemes.RATES, schemes.DEPTH)
    return [
        Variant(group, name, Scheme(name, grow, schemes.matching))
        for name, grow in {
            "fixed shape, perturbed scores": partial(
                schemes.fixed_tree, shape=shape, rank=schemes.drawn
            ),
            "fixed shape, raw probability": partial(
                schemes.fixed_tree, shape=shape, rank=schemes.probable
            ),
            "best by value, perturbed scores": partial(
                schemes.best_tree, nodes=schemes.NODES, rank=schemes.drawn
            ),
            "best by value, raw probability": partial(
                schemes.best_tree, nodes=schemes.NODES, rank=schemes.probable
            ),
        }.items()
    ]


# --- Measuring ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """One prompt by one variant. The reference has no seconds, and counts no bytes."""

    tokens: list[int]
    oracle_passes: int
    draft_passes: int
    bandwidth: float | None = None
    seconds: float | None = None


def ablate(
    stack: Stack,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    samplings: Mapping[str, Mapping[str, Any]],
    seed: int = 0,
    only: Sequence[Variant] | None = None,
    say: Say = print,
) -> list[Row]:
    """Decode every prompt by plain decoding and all variants in turn.

    Args:
      stack: the stack.
      prompts: texts or token ids; prompt ``i`` is continued with seed ``seed + i``.
      max_new_tokens: for each prompt.
      samplings: options of :func:`~ssd_jax.generate.generate`, by name.
      seed: the first prompt's.
      only: these instead of :func:`variants`.
      say: told of the progress.

    Returns:
      A row for each sampling and variant, plain decoding first:

        ``tokens per oracle pass``        new tokens over oracle passes, both summed
        ``relative bandwidth``            mean over the prompts, weighted by new tokens
        ``draft passes per oracle pass``  of all model drafts together
        ``speed``                         tokens a second over plain decoding's
        ``identical``                     texts that are the same as plain decoding's, of how many

      and ``None`` for what was not measured. A variant that the stack has no parts for has one
      row, which says so.
    """
    compared = [BASELINE, *(variants(stack) if only is None else only)]
    possible = [variant for variant in compared if not isinstance(variant.how, str)]
    skipped = [variant for variant in compared if isinstance(variant.how, str)]
    # What several variants have in common is run once.
    runs: dict[tuple[str, Any], list[_Run]] = {
        (name, variant.how): [] for name in samplings for variant in possible
    }
    for index, prompt in enumerate(prompts):
        say(f"ablations: prompt {index + 1} of {len(prompts)}")
        tokens = encode_prompt(stack, prompt)
        for (name, how), done in runs.items():
            options = {"max_new_tokens": max_new_tokens, "seed": seed + index, **samplings[name]}
            done.append(_run(stack, tokens, how, options))
    rows = [
        {"group": variant.group, "variant": variant.name, "sampling": name}
        | _figures(runs[name, variant.how], runs[name, BASELINE.how])
        for name in samplings
        for variant in possible
    ]
    return rows + [
        {"group": variant.group, "variant": f"{variant.name}: {variant.how}", "sampling": None}
        | dict.fromkeys(FIGURES)
        for variant in skipped
    ]


def _run(stack: Stack, prompt: list[int], how: Plan | Scheme, options: dict[str, Any]) -> _Run:
    if isinstance(how, Scheme):
        done = schemes.run(stack, how, prompt, **options)
        return _Run(done.tokens, done.passes, done.draft_passes)
    result, seconds, _ = clocked(lambda: generate(stack, prompt, plan=how, **options))
    stats = result.stats
    return _Run(
        result.tokens,
        stats.passes["oracle"],
        sum(count for stage, count in stats.passes.items() if stage != "oracle"),
        stats.relative_bandwidth,
        seconds,
    )


def _figures(own: Sequence[_Run], plain: Sequence[_Run]) -> Row:
    """The figures of one row, over the prompts."""
    tokens = sum(len(run.tokens) for run in own)
    passes = max(sum(run.oracle_passes for run in own), 1)
    read = _sum(None if r.bandwidth is None else r.bandwidth * len(r.tokens) for r in own)
    seconds, of_plain = (_sum(run.seconds for run in runs) for runs in (own, plain))
    speed = None
    if seconds and of_plain:
        speed = (tokens / seconds) / (sum(len(run.tokens) for run in plain) / of_plain)
    same = sum(a.tokens == b.tokens for a, b in zip(own, plain, strict=True))
    figures = (
        tokens / passes,
        None if read is None else read / max(tokens, 1),
        sum(run.draft_passes for run in own) / passes,
        speed,
        f"{same} of {len(own)}",
    )
    return dict(zip(FIGURES, figures, strict=True))


def _sum(values: Iterable[float | None]) -> float | None:
    """``None`` if any is."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table with the keys of the first row as its header."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
