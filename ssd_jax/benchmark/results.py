"""``results.json``: conditions, writing, reading back."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_jax.benchmark.measure import Record
from ssd_jax.errors import DataError
from ssd_jax.files import atomic_path

if TYPE_CHECKING:
    from ssd_jax.plan import Plan
    from ssd_jax.stack import Stack

SCHEMA = 3
NAME = "results.json"
VERSIONED = ("ssd-jax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "ctranslate2")
# What may differ where a run is continued: when and in which disturbance it was measured.
_PASSING = ("date", "load_average")

# The fields of each record and the types they may have.
_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (int,),
    "mode": (str,),
    "sampling": (str,),
    "repeat": (int,),
    "dtype": (str,),
    "prompt_tokens": (int,),
    "seconds": (int, float),
    "compile_seconds": (int, float),
    "new_tokens": (int,),
    "characters": (int, type(None)),
    "tokens": (list,),
    "finish_reason": (str,),
    "passes": (dict,),
    "round_tokens": (list, type(None)),
    "round_passes": (dict, type(None)),
    "round_widths": (list, type(None)),
    "origins": (str, type(None)),
    "relative_bandwidth": (int, float, type(None)),
    "min_margin": (int, float, type(None)),
}
_SECTIONS: dict[str, type] = {"conditions": dict, "costs": dict, "records": list, "summary": dict}


def conditions(stack: Stack, plans: Mapping[str, Plan], options: Mapping[str, Any]) -> Record:
    """What a reader must know to judge the figures: device, versions, models, options.

    Args:
      stack: what decodes.
      plans: of each own mode.
      options: of the run, in JSON's types.
    """
    import jax

    from ssd_jax.device import cores, device_name, read_text
    from ssd_jax.gpt2 import parameter_count
    from ssd_jax.memory import cache_bytes_per_token, weight_bytes

    device = jax.devices()[0]
    models = stack.models
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "backend": device.platform,
        "cpu_count": cores(),
        "frequency_governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONED},
        "commit": _commit(),
        "stages": list(stack.stage_names),
        "dtype": stack.oracle.numerics,
        "exact": stack.oracle.exact,
        "parameters": {name: parameter_count(model) for name, model in models.items()},
        "weight_bytes": {name: weight_bytes(model) for name, model in models.items()},
        "cache_bytes_per_token": {n: cache_bytes_per_token(m) for n, m in models.items()},
        "plans": {mode: json.loads(plan.to_json()) for mode, plan in plans.items()},
        **options,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, with ``-dirty`` if it was edited; ``None`` outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def peak_memory_bytes() -> int:
    """Of the device where it tells, else of this process."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get("peak_bytes_in_use", peak))


def write(folder: str | Path, document: Record) -> Path:
    """Write ``results.json`` in ``folder`` (made if need be), a line a record, never half there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in document.items() if name != "records"}
    lines = [json.dumps(record, allow_nan=False) for record in document.get("records", [])]
    head = json.dumps(rest, allow_nan=False, indent=1)
    with atomic_path(folder / NAME) as temporary:
        temporary.write_text(
            head[:-2] + ',\n "records": [\n' + ",\n".join(lines) + "\n ]\n}\n", encoding="utf-8"
        )
    return folder / NAME


def read(path: str | Path) -> Record:
    """A document that :func:`write` wrote, checked.

    Raises:
      DataError: it is damaged, or of another schema.
      OSError: it cannot be opened.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); take it away and measure again") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise DataError(f"{path} is not of schema {SCHEMA}; take it away and measure again")
    for name, kind in _SECTIONS.items():
        if not isinstance(document.get(name), kind):
            raise DataError(f"{path} has no {name}; take it away and measure again")
    for number, record in enumerate(document["records"]):
        for field, kinds in _FIELDS.items():
            value = record.get(field, ...) if isinstance(record, dict) else ...
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise DataError(
                    f"{path}: record {number} has no proper {field!r}; take the file away and "
                    "measure again"
                )
    return document


def continued(folder: str | Path, current: Record) -> Record:
    """A folder's ``results.json``, if it was measured as now; an empty document without it.

    Args:
      folder: of an earlier run.
      current: this run's conditions.

    Raises:
      DataError: it was measured under other conditions; the error names the first.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return {"records": []}
    document = read(path)
    earlier = document["conditions"]
    # Another run may ask for other modes; those of both must be the same.
    earlier = earlier | {"plans": {**current["plans"], **earlier.get("plans", {})}}
    current = current | {"plans": {**earlier["plans"], **current["plans"]}}
    for name in (*current, *earlier):
        before, now = repr(earlier.get(name)), repr(current.get(name))
        if name not in _PASSING and before != now:
            shown = f" ({before}, not {now})" if len(before + now) < 200 else ""
            raise DataError(f"{path} was measured with another {name}{shown}; give another --out")
    return document
