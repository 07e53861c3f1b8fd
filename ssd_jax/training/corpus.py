"""Documents: read, filtered, deduplicated, and split by module into training and held-out."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssd_jax.errors import DataError
from ssd_jax.training.config import END_OF_TEXT, DataConfig
from ssd_jax.training.functions import documented_functions
from ssd_jax.training.sources import Source, find_sources

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Document:
    """One file's text.

    Attributes:
      source: where it is from.
      path: its path there.
      module: the unit of the held-out split.
      text: its content, of ``size`` bytes in UTF-8.
      repeats: occurrences of its text in one epoch.
    """

    source: Source
    path: str
    module: str
    text: str
    repeats: int = 1

    @functools.cached_property
    def size(self) -> int:
        return len(self.text.encode())


@dataclasses.dataclass
class Corpus:
    """Documents by split, functions cut out of the training ones, and files left out by reason."""

    train: list[Document]
    heldout: list[Document]
    skipped: Counter[str]
    functions: list[Document] = dataclasses.field(default_factory=list)


def gather(config: DataConfig) -> Corpus:
    """Read, filter, deduplicate and split every document a config names.

    Raises:
      DataError: nothing usable was found for one of the splits.
    """
    corpus = Corpus([], [], Counter())
    prompts = _benchmark_lines(config.benchmark)
    seen: set[bytes] = set()
    for source in find_sources(config):
        budget = source.byte_limit
        for path in _shuffled(source):
            reason, text = _read(source.root / path)
            reason = reason or _unwanted(text, prompts, seen)
            module = _module(path, source.module_depth)
            document = Document(source, path, module, text, source.repeats)
            if not reason and document.size > budget:
                reason = "over the package's share"
            if reason:
                corpus.skipped[reason] += 1
                continue
            budget -= document.size
            (corpus.heldout if is_heldout(document, config) else corpus.train).append(document)
    if config.function_repeats:
        corpus.functions = list(_functions(corpus.train, seen, config.function_repeats))
    for name in SPLITS:
        if not getattr(corpus, name):
            raise DataError(
                f"no usable text for the {name} split (skipped: {dict(corpus.skipped)}); "
                "add folders or packages, or lower data.heldout_one_in"
            )
    return corpus


def _functions(documents: list[Document], seen: set[bytes], repeats: int) -> Iterator[Document]:
    """Every distinct documented function of the Python documents."""
    for document in documents:
        if not document.path.endswith(".py"):
            continue
        for text in documented_functions(document.text):
            if not _is_duplicate(text, seen):
                yield dataclasses.replace(document, text=text, repeats=repeats)


def _is_duplicate(text: str, seen: set[bytes]) -> bool:
    """Whether ``seen`` holds the digest of ``text``; adds it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    known = digest in seen
    seen.add(digest)
    return known


def _unwanted(text: str, prompts: frozenset[str], seen: set[bytes]) -> str:
    """Why a readable text is left out ("" if it is not); adds its digest to ``seen``."""
    if _is_duplicate(text, seen):
        return "duplicate"
    if not prompts.isdisjoint(map(_normalized, text.splitlines())):
        return "benchmark prompt"
    return ""


def _hash(*parts: str) -> int:
    """A stable 64-bit hash: the same in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _shuffled(source: Source) -> list[str]:
    """Files in a fixed pseudo-random order, so that a byte limit takes a fair sample of them."""
    return sorted(source.files, key=lambda path: _hash("order", source.name, path))


def _module(path: str, depth: int) -> str:
    """``a/b/c.py`` -> ``a.b.c`` cut to its first ``depth`` names."""
    parts = path.rsplit(".", 1)[0].split("/")
    return ".".join(parts[:depth])


def sample(documents: Sequence[Document], megabytes: float) -> Iterator[str]:
    """Texts of a fixed pseudo-random sample of whole documents of about that size."""
    budget = megabytes * 1e6
    for document in sorted(documents, key=lambda d: _hash("sample", d.source.name, d.path)):
        if budget <= 0:
            return
        budget -= document.size
        yield document.text


def is_heldout(document: Document, config: DataConfig) -> bool:
    """Whether a document's whole module belongs to the held-out split."""
    name = document.source.name
    if name == "stdlib" and document.module in config.heldout_modules:
        return True
    return _hash("split", name, document.module) % config.heldout_one_in == 0


_MACHINE_MADE = re.compile(
    r"generated (by|from|using|with|code)|auto[- ]?generated|automatically generated|do not edit",
    re.IGNORECASE,
)
_LONGEST_LINE = 1000
_LARGEST_FILE = 2_000_000


def _read(path: Path) -> tuple[str, str]:
    """Why a file is no text written by people ("" if it is one), and its text."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return "too large", ""
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError:
        return "unreadable", ""
    except UnicodeDecodeError:
        return "not UTF-8 text", ""
    if "\0" in text:
        return "binary", ""
    if not text.strip():
        return "empty", ""
    if max(map(len, text.splitlines())) > _LONGEST_LINE:
        return "very long lines", ""
    if _MACHINE_MADE.search(text[:1500]):
        return "generated", ""
    if sum(map(str.isdigit, text)) > 0.25 * len(text):
        return "mostly digits", ""
    if END_OF_TEXT in text:
        return f"contains {END_OF_TEXT}", ""
    return "", text


def _benchmark_lines(path: str) -> frozenset[str]:
    """Lines that give a benchmark problem away: its signature and its longer docstring lines."""
    if not path or not Path(path).is_file():
        return frozenset()
    opener = gzip.open if path.endswith(".gz") else open
    lines: set[str] = set()
    with opener(path, "rt", encoding="utf-8") as file:
        for record in file:
            problem = json.loads(record)
            for line in map(_normalized, problem["prompt"].splitlines()):
                is_signature = line.startswith(f"def {problem.get('entry_point')}(")
                if is_signature or (len(line) >= 40 and not line.startswith((">>>", "from "))):
                    lines.add(line)
    return frozenset(lines)


def _normalized(line: str) -> str:
    return " ".join(line.split())


def card(corpus: Corpus, config: DataConfig) -> dict:
    """What was read, under which licences, and what was left out: the data card."""
    rows: dict[str, dict] = {}
    for split in SPLITS:
        for document in getattr(corpus, split):
            source = document.source
            row = rows.setdefault(
                source.name,
                {"version": source.version, "licence": source.licence, "repeats": source.repeats}
                | {f"{s}_{unit}": 0 for s in SPLITS for unit in ("files", "bytes")},
            )
            row[f"{split}_files"] += 1
            row[f"{split}_bytes"] += document.size
    return {
        "sources": rows,
        "skipped": dict(sorted(corpus.skipped.items())),
        "heldout_modules": sorted({f"{d.source.name}: {d.module}" for d in corpus.heldout}),
        "benchmark_checked": bool(_benchmark_lines(config.benchmark)),
    }
