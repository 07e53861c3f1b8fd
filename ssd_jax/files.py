"""Files: where a model lies, small JSON files, and writing so that nothing is half-written."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ssd_jax.errors import CheckpointError, InsufficientMemoryError, SsdError

# No configuration, vocabulary or plan comes near it; parsed it takes many times as much memory.
_LARGEST_JSON = 2**27

# "name" or "owner/name", as the hub spells them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def locate(path_or_name: str | os.PathLike, hub_files: Iterable[str]) -> Path:
    """The local folder of a path, or of a hub model, whose ``hub_files`` are then fetched.

    Args:
      path_or_name: a folder; or, where there is none of that name, ``name`` or ``owner/name``
        on the Hugging Face hub.
      hub_files: file name patterns.

    Raises:
      CheckpointError: there is no such folder, or the hub cannot provide the files.
    """
    name = os.fspath(path_or_name)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name} is not a folder; give the folder that holds the model")
    # "checkpoints/typo" is a mistyped path, not a model of an owner called "checkpoints".
    mistyped = "/" in name and os.path.isdir(os.path.dirname(name))
    if not isinstance(path_or_name, str) or mistyped or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"no such folder: {name!r}; check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(hub_files)))
    except Exception as error:
        raise CheckpointError(
            f"no folder {name!r} here, and the Hugging Face hub gave none "
            f"({first_line(error)}); check the name and the connection"
        ) from error


def user_cache(kind: str) -> Path:
    """The folder for what may be made again (compiled programs, tuned plans); it need not exist.

    ``$SSD_JAX_CACHE``, or else where the platform keeps such things.
    """
    chosen = os.environ.get("SSD_JAX_CACHE")
    return Path(chosen or platformdirs.user_cache_path("ssd_jax", appauthor=False)) / kind


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; :class:`CheckpointError` if it holds anything else."""
    with explaining(path, "cannot be read"):
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it is larger than {_LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; fetch or export it again")
    return value


def write_json(path: Path, value: dict[str, Any]):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of ``path``, renamed to it if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explaining(path: Path, what: str, remedy: str = "fetch or export it again") -> Iterator[None]:
    """Turn whatever a library raises over a file into one line that names the file.

    The parsers of damaged input raise anything from ``OSError`` to ``RecursionError``.
    """
    try:
        yield
    except SsdError:
        raise
    except MemoryError as error:
        raise InsufficientMemoryError(
            f"{path}: {what} for want of memory; close what else takes memory, or {remedy}"
        ) from error
    except BaseException as error:
        # A panic of a library written in Rust is no Exception, and means the same here.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: {what} ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
