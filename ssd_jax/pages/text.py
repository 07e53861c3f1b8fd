"""The page of one text (``decode.py --html``): who proposed each token, and every round's tree."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax import pages
from ssd_jax.files import atomic_path
from ssd_jax.pages.trees import drawn_rounds
from ssd_jax.pages.wording import number, stage_label, visible

if TYPE_CHECKING:
    from ssd_jax.batch import GenerationResult
    from ssd_jax.plan import Plan
    from ssd_jax.stack import Stack

Record = dict[str, Any]


def save(
    path: str | os.PathLike,
    stack: Stack,
    prompt: str | Sequence[int],
    result: GenerationResult,
    plan: Plan,
    *,
    mode: str,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Write the page of a text, never half of it. Its rounds are run once more, one by one.

    Args:
      path: where to.
      stack: that wrote the text.
      prompt: its text or token ids.
      result: what :func:`ssd_jax.generate.generate` returned for it.
      plan: that it followed.
      mode: its name.
      max_new_tokens, options: as they were for ``generate``.

    Raises:
      PromptError: the stack has no tokenizer.
      OSError: the file cannot be written.
    """
    from ssd_jax.generate import encode_prompt
    from ssd_jax.rounds import oracle_view, round_trees
    from ssd_jax.show import pieces

    texts = pieces(stack, result.tokens)
    assert stack.tokenizer is not None  # or `pieces` would have raised
    ids = encode_prompt(stack, prompt)
    document = {
        "prompt": prompt if isinstance(prompt, str) else stack.tokenizer.decode(ids),
        "pieces": list(zip(texts, result.origins, strict=True)),
        "view": oracle_view(stack, ids, result.tokens),
        "trees": round_trees(stack, ids, plan, max_new_tokens=max_new_tokens, **options),
        "figures": figures(result, mode=mode, **options),
        "lead": f"{result.stats.new_tokens} tokens in {result.stats.rounds} passes of the oracle: "
        f"{result.stats.tokens_per_oracle_pass:.2f} a pass, where plain decoding has one.",
        "round_tokens": result.stats.round_tokens,
    }
    page = render(document)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # of lone surrogates


def render(document: Record) -> str:
    """The page.

    Args:
      document: ``prompt``; ``pieces``, text and stage of each token; ``view``, probability and
        rank of each; ``round_tokens``, how many tokens each round wrote; ``trees``, as of
        :func:`ssd_jax.rounds.round_trees`; ``figures``, pairs of words; ``lead``, a sentence.
    """
    trees, written = document["trees"], document["pieces"]
    rounds = [i for i, count in enumerate(document["round_tokens"]) for _ in range(count)]
    stages = {stage for _, stage in written} | {node["stage"] for tree in trees for node in tree}
    return pages.render(
        "text.html.j2",
        lead=document["lead"],
        prompt=document["prompt"],
        stages=sorted(stages, key=pages.stage_rank),
        shares=pages.shares(stage for _, stage in written),
        tokens=[
            {
                "text": text,
                "stage": stage,
                "round": place,
                "title": _title(text, stage, view, place),
            }
            for (text, stage), view, place in zip(written, document["view"], rounds, strict=True)
        ],
        figures=document["figures"],
        rounds=drawn_rounds(trees, written),
    )


def _title(text: str, stage: str, view: tuple[float, int], place: int) -> str:
    probability, rank = view
    chance = f"{number(100 * probability, '.3g')}\N{NO-BREAK SPACE}%"
    origin = "written by the" if stage == "oracle" else "proposed by the"
    return (
        f"{visible(text)} – {origin} {stage_label(stage)}, round {place + 1}; "
        f"the oracle gives it {chance}, rank {rank:,}"
    )


_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")


def figures(result: GenerationResult, *, mode: str, **options: Any) -> list[tuple[str, str]]:
    """A text's statistics as names and words, for the page and ``decode.py --stats``."""
    stats = result.stats
    passes = ", ".join(f"{stage_label(name)} {count}" for name, count in stats.passes.items())
    origins = ", ".join(
        f"{stage_label(stage)} {share:.0%}" for stage, share in pages.shares(result.origins)
    )
    greedy = not options.get("temperature")
    chosen = ["greedy"] if greedy else []
    chosen += [
        f"{name.replace('_', '-')} {value}"
        for name, value in options.items()
        if value is not None and not (greedy and name in _OF_DRAWING)
    ]
    return [
        ("mode", mode),
        ("sampling", ", ".join(chosen)),
        ("tokens", f"{stats.new_tokens} (ended by: {result.finish_reason})"),
        ("passes", passes),
        ("tokens per oracle pass", f"{stats.tokens_per_oracle_pass:.2f}"),
        ("proposed by", origins or "-"),
        ("tokens of a round", _histogram(stats.round_tokens)),
        ("relative bandwidth", f"{stats.relative_bandwidth:.2f}"),
        ("smallest margin", f"{stats.min_margin:.3g}"),
        ("seconds", f"{stats.seconds:.2f} ({stats.tokens_per_second:.1f} tokens/s)"),
        ("program", _program(stats)),
    ]


def _histogram(round_tokens: Sequence[int]) -> str:
    counts = sorted(Counter(round_tokens).items())
    return ", ".join(f"{size} ({count}×)" for size, count in counts) or "-"


def _program(stats) -> str:
    if not stats.compile_seconds:
        return "at hand"
    return f"{'read' if stats.from_cache else 'compiled'} in {stats.compile_seconds:.1f} s"
