"""How much memory a stack will take, known before any of it is taken."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import psutil
from flax import nnx

from ssd_jax.errors import InsufficientMemoryError, ran_out_of_memory
from ssd_jax.gpt2 import GPT2, Tiles
from ssd_jax.plan import Capacities

REMEDY = "take a smaller model, a narrower dtype (bfloat16, int8), or another device"
BATCH_REMEDY = "lower batch_size, max_new_tokens or the plan's widths, or shorten the prompts"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    Attributes:
      weights: of all models.
      caches: keys and values.
      passes: what the widest pass computes, mostly logits.
    """

    weights: int
    caches: int
    passes: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.passes

    def __str__(self) -> str:
        parts = f"weights {_size(self.weights)}, caches {_size(self.caches)}"
        return f"{_size(self.total)} ({parts}, passes {_size(self.passes)})"


def estimate(models: Sequence[GPT2], capacities: Capacities, rows: int = 1) -> Estimate:
    """What decoding a batch of ``rows`` takes.

    Args:
      models: oracle first; :func:`ssd_jax.gpt2.abstract` ones are enough.
      capacities: of a plan, which may leave out the last of the drafts.
      rows: B.
    """
    caches = passes = 0
    for index, model in enumerate(models[: len(capacities.widths)]):
        slots = capacities.slots(index)
        caches += rows * slots * cache_bytes_per_token(model)
        config = model.config
        width = max(capacities.widths[index], capacities.prefill_rows(rows))
        # Logits, warped, with noise, and noise itself; scores and their softmax; activations.
        logits = 4 * capacities.widths[index] * config.vocab_size
        attention = 2 * config.n_head * width * slots
        passes = max(passes, 4 * rows * (logits + attention + 2 * width * config.inner_dim))
    return Estimate(sum(map(weights, models)), caches, passes)


_weights: weakref.WeakKeyDictionary[GPT2, tuple[int, int]] = weakref.WeakKeyDictionary()


def weights(model: GPT2) -> int:
    """Bytes of a model's parameters and of their second copy (:class:`~ssd_jax.gpt2.Tiles`)."""
    return sum(_parameters_and_tiles(model))


def weight_bytes(model: GPT2) -> int:
    """Bytes of weights that one forward pass reads: all but the embedding rows not looked up."""
    skipped = model.wpe[...].nbytes + (0 if model.lm_head is None else model.wte[...].nbytes)
    return _parameters_and_tiles(model)[0] - skipped


def _parameters_and_tiles(model: GPT2) -> tuple[int, int]:
    # Remembered, as shapes and types stay: every text asks for it, and going through a module takes
    # milliseconds.
    if model not in _weights:
        states = (nnx.state(model, kind) for kind in (nnx.Param, Tiles))
        params, tiles = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            for state in states
        )
        _weights[model] = params, tiles
    return _weights[model]


def cache_bytes_per_token(model: GPT2) -> int:
    """Bytes of keys and values that one cached token costs each pass."""
    width = model.config.n_layer * model.config.n_embd
    return 2 * width * model.dtype.itemsize


def available() -> int | None:
    """Bytes that the default device has left, or ``None`` where that cannot be told."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _available_on_host()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _available_on_host() -> int:
    found = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        found.append(limit - used)
    return min(found)


def mappings() -> float:
    """Of the memory mappings that this process may have, the share that it has; 0 where there is
    no such limit."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as lines:
            return sum(1 for _ in lines) / limit
    except (OSError, ValueError):
        return 0.0


def check(needed: int, what: str, remedy: str = REMEDY) -> None:
    """Refuse what cannot fit.

    Raises:
      InsufficientMemoryError: ``needed`` bytes are more than there are.
    """
    left = available()
    if left is not None and needed > left:
        raise InsufficientMemoryError(
            f"{what} needs about {_size(needed)} of memory but {_size(left)} are left; {remedy}"
        )


@contextlib.contextmanager
def reported(what: str, remedy: str = BATCH_REMEDY) -> Iterator[None]:
    """Turn a device's own complaint into one that says what to do.

    Raises:
      InsufficientMemoryError: the device ran out of memory.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if ran_out_of_memory(error):
            raise InsufficientMemoryError(f"{what} ran out of memory; {remedy}") from error
        raise


def _size(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"
