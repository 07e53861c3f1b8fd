"""The trios that come with the package, found by name from a clone and from an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

from ssd_jax.errors import CheckpointError

DEFAULT = "python-small"

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries them inside the package; in a clone they lie beside it.
_FOLDERS = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")


def names() -> list[str]:
    """The names of the trios that this installation has."""
    return sorted({oracle.parent.name for at in _FOLDERS for oracle in at.glob("*/oracle")})


def contains(folder: Path) -> bool:
    """Whether a folder is one of a shipped trio."""
    return folder.resolve().parent in _FOLDERS


def locate(path_or_name: str | os.PathLike) -> Path:
    """The folder of a trio: the one of that path, or else the shipped one of that name.

    Raises:
      CheckpointError: there is neither.
    """
    name = os.fspath(path_or_name)
    if os.path.isdir(name):
        return Path(name)
    if name in names():
        return next(at / name for at in _FOLDERS if (at / name / "oracle").is_dir())
    known = ", ".join(names()) or "none in this installation"
    raise CheckpointError(
        f"no trio folder {name!r}, and no shipped trio of that name (shipped: {known}); "
        "check the path, or name the models one by one (oracle=..., --oracle X)"
    )
