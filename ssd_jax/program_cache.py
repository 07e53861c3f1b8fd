"""Compiled programs kept from one process to the next, in the user's cache folder.

XLA needs many seconds for the loop, and a fraction of one to read the result back. JAX keeps
such results itself once it is told where; what is added here is the place, a bound on its size,
and that nothing of it lasts: JAX's settings belong to the process, not to a library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ssd_jax import files

MAX_BYTES = 512 * 2**20  # about a thousand programs of the shipped trio's size

_TROUBLE = "Error (reading|writing) persistent compilation cache entry"
_lock = threading.Lock()
_hits = 0


def _count_hits(event: str, **_) -> None:
    global _hits
    _hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count_hits)


@dataclasses.dataclass
class Origin:
    """Where a program came from: ``kept`` if it was not compiled but read back."""

    kept: bool = False


@contextlib.contextmanager
def keeping() -> Iterator[Origin]:
    """What is compiled within the block is kept, or was.

    A cache that the user has given JAX (``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``) is used
    instead of ours and left as it is; ``JAX_ENABLE_COMPILATION_CACHE=0`` turns both off. A folder
    that cannot be read or written costs the time to compile and nothing else.
    """
    origin = Origin()
    # One at a time, or one thread would take the settings of another for the user's.
    with _lock:
        before = _hits
        if _setting("jax_enable_compilation_cache") and not _setting("jax_compilation_cache_dir"):
            with _cache_in(files.user_cache("compiled")):
                yield origin
        else:
            yield origin
        origin.kept = _hits > before


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # Ours is bounded below. JAX's bound takes a lock file and another package, and stops
        # working for good when a process dies between two of its writes.
        "jax_compilation_cache_max_size": -1,
    }
    saved = {name: _setting(name) for name in settings}
    _configure(settings)
    try:
        # Recorded, since what goes wrong here is nothing that a user has to know.
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=_TROUBLE)
            yield
    finally:
        _configure(saved)
    others = [w for w in caught if not re.match(_TROUBLE, str(w.message))]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    # JAX never replaces an entry, so a damaged one would be in the way for ever.
    _shrink(folder, MAX_BYTES if len(others) == len(caught) else 0)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX reads the settings once, at its first look-up


def _shrink(folder: Path, limit: int) -> None:
    """Delete the files used least recently until the rest is within ``limit`` bytes."""
    with contextlib.suppress(OSError):
        # Programs, and on a GPU how their kernels were tuned. Nothing else there is ours.
        found = [*folder.glob("*-cache"), *folder.glob("xla_gpu_*/*")]
        entries = [(path, path.stat()) for path in found]
        entries.sort(key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime), reverse=True)
        total = 0
        for path, status in entries:
            total += status.st_size
            if total > limit:
                path.unlink(missing_ok=True)
