"""Where training text comes from: folders, the standard library, installed packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssd_jax.errors import DataError
from ssd_jax.training.config import DataConfig

# Words of SPDX expressions, and the phrases of free-form metadata, that grant use with no
# obligation on derived works beyond keeping notices.
_PERMISSIVE_IDS = {
    "0bsd", "afl-2.1", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cnri-python", "hpnd", "isc", "mit", "mit-cmu", "psf-2.0", "python-2.0", "unlicense", "zlib",
    "llvm-exception",
}  # fmt: skip
_PERMISSIVE_PHRASE = re.compile(
    r"(the )?(new |modified |simplified )?(0bsd|apache([ -]software)?( license)?[ ,-]*"
    r"(version )?(2(\.0)?)?|bsd([ -][23][ -]clause)?|[23][ -]clause bsd|mit(-cmu)?|isc|hpnd|"
    r"historical permission notice and disclaimer \(hpnd\)|psf(-2\.0)?|python software foundation|"
    r"python-2\.0|(the )?unlicense)( license| licence)?( \((unlicense|iscl)\))?",
    re.IGNORECASE,
)
_SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "testing", "idle_test", "site-packages", "_vendor",
    "vendored", "vendor", "third_party", "extern", "externals", "node_modules",
}  # fmt: skip
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.\w+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A body of files under one licence.

    Attributes:
      name: package name, ``stdlib``, or a folder's name.
      version: version of the package ("" where there is none).
      licence: the licence as its metadata state it.
      root: folder that ``files`` are relative to.
      files: the candidate files, sorted.
      module_depth: leading path components that name a module, the unit of the held-out split.
      repeats: occurrences of its text in one epoch.
      byte_limit: at most this much of its text is used.
    """

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[str, ...]
    module_depth: int = 3
    repeats: int = 1
    byte_limit: float = float("inf")


def find_sources(config: DataConfig) -> list[Source]:
    """The sources a config names.

    Raises:
      DataError: a folder does not exist, or a named package is missing or not permissively
        licensed.
    """
    found = [_folder(Path(folder), config.suffixes) for folder in config.folders]
    if config.stdlib:
        found.append(_standard_library(config.stdlib_repeats))
    return found + list(_installed(config.packages, config.package_megabytes * 1e6))


def _folder(root: Path, suffixes: Sequence[str]) -> Source:
    if not root.is_dir():
        raise DataError(f"the text folder {root} does not exist; correct data.folders")
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in suffixes)
    return Source(root.name, "", "the user's own", root, tuple(sorted(paths)), module_depth=2)


def _standard_library(repeats: int) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    version = sysconfig.get_python_version()
    files = tuple(sorted(path for path in paths if _is_source(path)))
    return Source("stdlib", version, "PSF-2.0", root, files, module_depth=1, repeats=repeats)


def _installed(packages: Sequence[str], byte_limit: float) -> Iterator[Source]:
    """Installed distributions that are permissively licensed and not editable installs."""
    everything = "*" in packages
    missing = {name.lower() for name in packages} - {"*"}
    found = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    for name, distribution in sorted(found.items()):
        if not everything and name not in missing:
            continue
        missing.discard(name)
        licence = permissive_licence(distribution.metadata)
        if licence is None:
            if name in map(str.lower, packages):
                raise DataError(f"package {name} has no known permissive licence; remove it")
            continue
        paths = (p.as_posix() for p in distribution.files or () if p.suffix == ".py")
        files = tuple(sorted(path for path in paths if _is_source(path)))
        root = Path(str(distribution.locate_file("")))
        if files:
            yield Source(name, distribution.version, licence, root, files, byte_limit=byte_limit)
    if missing:
        raise DataError(f"package {sorted(missing)[0]} is not installed; install or remove it")


def _is_source(path: str) -> bool:
    *folders, name = path.split("/")
    # Files outside the package's own folder ("../../bin/x") are scripts, not modules.
    return not (_SKIPPED_FOLDERS | {".."}) & set(folders) and not _TEST_FILE.fullmatch(name)


def permissive_licence(metadata) -> str | None:
    """The licence of a distribution if it is known to be permissive, else ``None``.

    ``License-Expression`` (SPDX) decides where present; else ``License`` where it is a short
    name; else the trove classifiers, all of which must be permissive.
    """
    expression = metadata.get("License-Expression")
    if expression:
        return expression if _is_permissive(expression) else None
    line = (metadata.get("License") or "").strip()
    if line and len(line) < 60 and "copyright" not in line.lower() and "===" not in line:
        if _is_permissive(line):
            return line
        if "agreement" not in line.lower():
            return None
    classifiers = [
        c.split("::")[-1].strip()
        for c in metadata.get_all("Classifier") or ()
        if c.startswith("License ::") and not c.endswith("OSI Approved")
    ]
    if classifiers and all(map(_is_permissive, classifiers)):
        return ", ".join(classifiers)
    return None


def _is_permissive(text: str) -> bool:
    """Whether every alternative and part of an SPDX expression or licence name is permissive."""
    parts = re.split(r"\s+(?:and|or|with)\s+|[()]", text, flags=re.IGNORECASE)
    parts = [part.strip() for part in parts if part.strip()]
    known = all(p.lower() in _PERMISSIVE_IDS or _PERMISSIVE_PHRASE.fullmatch(p) for p in parts)
    return bool(parts) and (known or bool(_PERMISSIVE_PHRASE.fullmatch(text.strip())))
