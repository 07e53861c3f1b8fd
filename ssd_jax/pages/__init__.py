"""Pages to look at: each one file that stands alone.

No network, no fonts, no scripts but a page's own, whose hash its content policy names. Prompts
and texts are hostile until escaped; Jinja escapes everything here. Drawings are SVG, styled by the
page, so that they follow its colours, light or dark.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jinja2

from ssd_jax.pages import wording


def render(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of ``values``.

    Args:
      template: its file name.
      values: what it shows; what is missing is shown as missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssd_jax", "pages"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": wording.number,
        "pct": wording.percent,
        "times": wording.times,
        "interval": wording.interval,
        "visible": wording.visible,
        "stage_class": wording.stage_class,
        "stage_label": wording.stage_label,
        "sampling_label": wording.sampling_label,
        "policy_hash": _policy_hash,
    }
    return environment.get_template(template).render(**values)


def _policy_hash(script: str) -> str:
    """As a content security policy names an inline script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def shares(stages: Iterable[str]) -> list[tuple[str, float]]:
    """The share of each stage, the oracle first and the n-gram last."""
    counts = Counter(stages)
    total = sum(counts.values())
    return [(stage, counts[stage] / total) for stage in sorted(counts, key=stage_rank)]


def stage_rank(stage: str) -> tuple[bool, bool, str]:
    """Sorts stages: the oracle first, the n-gram last."""
    return stage != "oracle", stage == "ngram", stage
