"""Plans that the tuner found, kept per device and stack in the user's cache folder.

A file holds the plans for greedy and for sampled decoding, what a pass of each stage costs by
its width, and the conditions that both depend on: the device and its cores, the versions of JAX,
and the stack (:attr:`ssd_jax.stack.Stack.digest`). Anything else is another file. A file that is
damaged, of another schema, or not about this device and stack is ignored with a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

from ssd_jax.costs import PassCosts
from ssd_jax.device import cores, device_name
from ssd_jax.errors import CheckpointError, PlanError
from ssd_jax.files import atomic_path, first_line, read_json, user_cache, write_json
from ssd_jax.plan import Plan
from ssd_jax.stack import Stack

# Raise it when the engine's costs change so much that old plans are no longer any good.
SCHEMA = 2
#: Kinds of text that have a plan of their own.
KINDS = ("greedy", "sampled")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the tuner keeps.

    Attributes:
      plans: by kind of decoding, of :data:`KINDS`; one may be absent.
      speedups: measured, over plain decoding; ``None`` where the search was interrupted before
        anything was measured.
      costs: of passes alone.
    """

    plans: Mapping[str, Plan]
    speedups: Mapping[str, float | None]
    costs: PassCosts


def conditions(stack: Stack) -> dict[str, Any]:
    """What a plan is made for. With any of it changed, another plan may be the best."""
    return {
        "device": device_name(),
        "platform": jax.default_backend(),
        "cores": cores(),
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "dtype": stack.oracle.numerics,
        "stack": stack.digest,
    }


def path_for(stack: Stack) -> Path:
    """Where the plans for this device and stack lie; the file need not exist."""
    known = conditions(stack)
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache("plans") / f"{known['platform']}-{known['dtype']}-{name}.json"


def save(stack: Stack, tuned: Tuned) -> Path:
    """Write a file, never half of one; what it held of the other kind stays.

    Raises:
      OSError: the cache folder cannot be written.
    """
    path = path_for(stack)
    earlier = load(stack)
    kept = {} if earlier is None else earlier.plans
    speedups = {} if earlier is None else earlier.speedups
    plans = {**kept, **tuned.plans}
    document = {
        "schema": SCHEMA,
        "conditions": conditions(stack),
        "plans": {kind: json.loads(plan.to_json()) for kind, plan in plans.items()},
        "speedups": {**speedups, **tuned.speedups},
        "costs": dataclasses.asdict(tuned.costs),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write_json(temporary, document)
    return path


def load(stack: Stack) -> Tuned | None:
    """The plans for this device and stack, or ``None`` where there are none or they are no good."""
    if not user_cache("plans").is_dir():  # spares the untuned a look at the stack's weights
        return None
    path = path_for(stack)
    if not path.is_file():
        return None
    try:
        return _parsed(read_json(path), stack, path)
    except (CheckpointError, PlanError) as error:
        warnings.warn(
            f"tuned plans ignored: {first_line(error)}; run scripts/tune.py anew, or remove {path}",
            stacklevel=2,
        )
        return None


def load_costs(stack: Stack) -> PassCosts | None:
    """The measured pass costs for this device and stack, if the tuner has run."""
    tuned = load(stack)
    return None if tuned is None else tuned.costs


def _are_costs(values: Iterable[float]) -> bool:
    return all(0 < value < math.inf for value in values)


def _parsed(document: dict[str, Any], stack: Stack, path: Path) -> Tuned:
    if document.get("schema") != SCHEMA:
        raise PlanError(f"{path} is not of schema {SCHEMA}")
    if document.get("conditions") != conditions(stack):
        raise PlanError(f"{path} was made for another device or stack")
    try:
        plans = {
            kind: Plan.from_json(json.dumps(plan), f"{path}, {kind}")
            for kind, plan in document["plans"].items()
        }
        for kind, plan in plans.items():
            if kind not in KINDS:
                raise PlanError(f"{path}: unknown kind of decoding {kind!r}")
            plan.check_stack(len(stack.drafts), stack.ngram is not None)
        speedups = {
            kind: None if speed is None else float(speed)
            for kind, speed in document["speedups"].items()
        }
        costs = document["costs"]
        seconds = {
            str(stage): {int(width): float(cost) for width, cost in own.items()}
            for stage, own in costs["seconds"].items()
        }
        if not all(own and _are_costs(own.values()) for own in seconds.values()):
            raise PlanError(f"{path}: a cost is missing or not positive")
        return Tuned(plans, speedups, PassCosts(seconds, int(costs["slots"])))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{path} is damaged ({first_line(error)})") from None
