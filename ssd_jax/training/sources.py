"""Where training text comes from: files on disk, files of records, and hub datasets."""

from __future__ import annotations

import abc
import dataclasses
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_LARGEST_TEXT = 2_000_000  # bytes
# Escapes make JSON up to six times as long as its text, and there are other fields beside it.
_LARGEST_LINE = 8 * _LARGEST_TEXT
_EMPTY_RECORD = 1000  # bytes a record without text counts for, so that reading those ends too
_HUB_NAME = re.compile(r"(?P<path>.+?)(:(?P<config>[^:@/]+))?(@(?P<split>[^@/]+))?")


class Text(NamedTuple):
    """One candidate document of a source.

    Attributes:
      path: its path within the source, or its number.
      module: the unit of the held-out split.
      text: its content, lines ending in ``\\n`` alone.
      reason: why it cannot be used ("" if it can).
      licence: its own licence ("" for the source's).
    """

    path: str
    module: str
    text: str
    reason: str = ""
    licence: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A body of text.

    Attributes:
      name: package name, ``stdlib``, or the name of a folder, file or dataset.
      version: version of the package ("" where there is none).
      licence: the licence as its metadata state it.
      repeats: occurrences of its text in one epoch.
      byte_limit: at most this much of its text is used.
    """

    name: str
    version: str = ""
    licence: str = "the user's own"
    repeats: int = 1
    byte_limit: float = float("inf")

    @property
    def split_name(self) -> str:
        """What modules are named within: sources that share it hold out the same modules."""
        return self.name

    @abc.abstractmethod
    def texts(self) -> Iterator[Text]:
        """Its candidate documents, in an order that depends on nothing but the source.

        Raises:
          DataError: the source as a whole cannot be read.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Source):
    """A source of one file a document.

    Attributes:
      root: folder that ``files`` are relative to.
      files: the candidate files.
      module_depth: leading path components that name a module.
    """

    root: Path
    files: tuple[str, ...]
    module_depth: int = 3

    def texts(self) -> Iterator[Text]:
        # Pseudo-random, so that a byte limit takes a fair sample of the files.
        for path in sorted(self.files, key=lambda path: stable_hash("order", self.name, path)):
            names = path.rsplit(".", 1)[0].split("/")  # a/b/c.py -> a, b, c
            reason, text = _read(self.root / path)
            yield Text(path, ".".join(names[: self.module_depth]), text, reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Source):
    """A source of one record a document.

    Reading stops once ``byte_limit`` was read, used or not: what is read may be a download.

    Attributes:
      records: starts reading; yields objects and, in the place of a damaged one, what is wrong.
      config: names the fields.
    """

    records: Callable[[], Iterable[dict | str]]
    config: DataConfig

    @property
    def split_name(self) -> str:
        # One group may be spread over several files.
        return "records" if self.config.group_field else self.name

    def texts(self) -> Iterator[Text]:
        read = 0
        for number, record in enumerate(self.records(), start=1):
            item = self._item(str(number), record)
            read += len(item.text.encode()) or _EMPTY_RECORD
            if read > self.byte_limit:
                return
            yield item

    def _item(self, number: str, record: dict | str) -> Text:
        config = self.config
        text, module, licence = "", number, ""
        try:
            if isinstance(record, str):
                raise _Unusable(record)
            text = _string(record, config.text_field).replace("\r\n", "\n")
            if len(text.encode()) > _LARGEST_TEXT:
                raise _Unusable("too large")
            if config.group_field:
                module = _string(record, config.group_field)
            if config.licence_field:
                licence = _permissive_names(record.get(config.licence_field))
        except _Unusable as unusable:
            return Text(number, module, text, str(unusable))
        return Text(number, module, text, licence=licence)


class _Unusable(Exception):
    """Why a record cannot be used."""


def stable_hash(*parts: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    # File names need not be UTF-8; Python then spells their bytes as surrogates.
    data = "\0".join(parts).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def find_sources(config: DataConfig) -> list[Source]:
    """The sources a config names. Touches the network only for ``config.hub``.

    Raises:
      DataError: a folder or file does not exist; a named package is missing or not permissively
        licensed; a dataset cannot be opened, or lacks a field the config names.
    """
    found: list[Source] = [_folder(Path(folder), config.suffixes) for folder in config.folders]
    if config.stdlib:
        found.append(_standard_library(config.stdlib_repeats))
    found += _installed(config.packages, config.package_megabytes * 1e6)
    found += [_jsonl_file(Path(path), config) for path in config.jsonl]
    return found + [_hub_dataset(name, config) for name in config.hub]


def _folder(root: Path, suffixes: Sequence[str]) -> Files:
    if not root.is_dir():
        raise DataError(f"the text folder {root} does not exist; correct data.folders")
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in suffixes)
    return Files(name=root.name, root=root, files=tuple(paths), module_depth=2)


def _standard_library(repeats: int) -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    return Files(
        name="stdlib",
        version=sysconfig.get_python_version(),
        licence="PSF-2.0",
        repeats=repeats,
        root=root,
        files=tuple(path for path in paths if _is_source(path)),
        module_depth=1,
    )


def _installed(packages: Sequence[str], byte_limit: float) -> Iterator[Files]:
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
        files = tuple(path for path in paths if _is_source(path))
        if files:
            yield Files(
                name=name,
                version=distribution.version,
                licence=licence,
                byte_limit=byte_limit,
                root=Path(str(distribution.locate_file(""))),
                files=files,
            )
    if missing:
        raise DataError(f"package {sorted(missing)[0]} is not installed; install or remove it")


def _is_source(path: str) -> bool:
    *folders, name = path.split("/")
    # Files outside the package's own folder ("../../bin/x") are scripts, not modules.
    return not (_SKIPPED_FOLDERS | {".."}) & set(folders) and not _TEST_FILE.fullmatch(name)


def _read(path: Path) -> tuple[str, str]:
    """Why a file is no text ("" if it is one), and its text."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return "unreadable", ""
        if status.st_size > _LARGEST_TEXT:
            return "too large", ""
        return "", path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError:
        return "unreadable", ""
    except UnicodeDecodeError:
        return "not UTF-8 text", ""


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
      DataError: it cannot be read, or is no text.
    """
    reason, text = _read(path)
    if reason:
        raise DataError(f"{path}: {reason}; give a text file")
    return text


def _jsonl_file(path: Path, config: DataConfig) -> Records:
    if not path.is_file():
        raise DataError(f"the file of records {path} does not exist; correct data.jsonl")
    return Records(name=path.name, records=functools.partial(jsonl_records, path), config=config)


def jsonl_records(path: Path) -> Iterator[dict | str]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file; for a damaged line, what is wrong.

    Raises:
      DataError: the file cannot be opened or unpacked.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            while line := file.readline(_LARGEST_LINE):
                rest = line
                while len(rest) == _LARGEST_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(_LARGEST_LINE)
                if rest is not line:
                    yield "too large"
                elif line.strip():
                    yield _object(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}); repair it or leave it out") from error


def _object(line: bytes) -> dict | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _string(record: dict, field: str) -> str:
    value = record.get(field)
    if value is None:
        raise _Unusable(f"no field {field}")
    if not isinstance(value, str):
        raise _Unusable(f"field {field} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise _Unusable("not UTF-8 text") from None
    return value


def _hub_dataset(name: str, config: DataConfig) -> Records:
    """The dataset ``path[:config][@split]``, opened and its first record looked at."""
    parts = _HUB_NAME.fullmatch(name)
    if parts is None:
        raise DataError("data.hub holds an empty name; write owner/name[:config][@split]")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError("data.hub needs the datasets library; pip install datasets") from error
    path = parts["path"]
    try:
        dataset = datasets.load_dataset(
            path, parts["config"], split=parts["split"] or "train", streaming=True
        )
        first = next(iter(dataset), None)
    except Exception as error:  # of any of the libraries that the download goes through
        raise _hub_error(name, error) from error
    for setting in ("text_field", "group_field", "licence_field"):
        field = getattr(config, setting)
        if first is not None and field and field not in first:
            raise DataError(
                f"the dataset {name} has no field {field!r} but {', '.join(first)}; "
                f"set data.{setting} to one of those"
            )
    # Where a folder lies is nobody else's business, and must not decide what is held out.
    shown = Path(path).name + name[len(path) :] if Path(path).is_dir() else name
    return Records(
        name=shown,
        licence="the dataset's own",
        byte_limit=config.hub_megabytes * 1e6,
        records=functools.partial(_streamed, name, dataset),
        config=config,
    )


def _streamed(name: str, dataset: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except Exception as error:  # see above
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    return DataError(
        f"cannot read the dataset {name} ({cause}); check the network and "
        "owner/name[:config][@split] in data.hub"
    )


def _permissive_names(value: Any) -> str:
    """The licence of a record, one name or a list of them, all permissive."""
    names = value if isinstance(value, list) else [value]
    short = bool(names) and all(isinstance(name, str) and len(name) <= 200 for name in names)
    if not short or not all(map(_is_permissive, names)):
        raise _Unusable("no known permissive licence")
    return ", ".join(" ".join(name.split()) for name in names)


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
