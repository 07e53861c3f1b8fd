"""Documents: filtered, deduplicated, and split by module into training and held-out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssd_jax.errors import DataError
from ssd_jax.training.config import END_OF_TEXT, DataConfig
from ssd_jax.training.functions import documented_functions
from ssd_jax.training.sources import (
    Records,
    Source,
    find_sources,
    jsonl_records,
    stable_hash,
)

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Document:
    """The text of one file, record or function.

    Attributes:
      source: where it is from.
      path: its path there, or its number.
      module: the unit of the held-out split.
      text: its content, of ``size`` bytes in UTF-8.
      licence: the licence it is under.
      repeats: occurrences of its text in one epoch.
    """

    source: Source
    path: str
    module: str
    text: str
    licence: str
    repeats: int = 1

    @functools.cached_property
    def size(self) -> int:
        return len(self.text.encode())


@dataclasses.dataclass
class Corpus:
    """Documents by split, functions cut out of the training ones, and a count of what was left
    out by reason."""

    train: list[Document]
    heldout: list[Document]
    skipped: Counter[str]
    functions: list[Document] = dataclasses.field(default_factory=list)


def gather(config: DataConfig) -> Corpus:
    """Read, filter, deduplicate and split every document a config names.

    Raises:
      DataError: a source or the benchmark cannot be read, or nothing usable was found for one of
        the splits.
    """
    corpus = Corpus([], [], Counter())
    prompts = _benchmark_lines(config.benchmark)
    seen: set[bytes] = set()
    for source in find_sources(config):
        budget = source.byte_limit
        for path, module, text, reason, licence in source.texts():
            reason = reason or _unwanted(text, prompts, seen)
            licence = licence or source.licence
            document = Document(source, path, module, text, licence, source.repeats)
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
                "add text to the data section, or lower data.heldout_one_in"
            )
    return corpus


def _functions(documents: list[Document], seen: set[bytes], repeats: int) -> Iterator[Document]:
    """Every distinct documented function of the Python documents."""
    for document in documents:
        # A record does not say what it holds; one that is no Python has no functions.
        if not (document.path.endswith(".py") or isinstance(document.source, Records)):
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


def sample(documents: Sequence[Document], megabytes: float) -> Iterator[str]:
    """Texts of a fixed pseudo-random sample of whole documents of about that size."""
    budget = megabytes * 1e6
    for document in sorted(documents, key=lambda d: stable_hash("sample", d.source.name, d.path)):
        if budget <= 0:
            return
        budget -= document.size
        yield document.text


def is_heldout(document: Document, config: DataConfig) -> bool:
    """Whether a document's whole module belongs to the held-out split."""
    source = document.source
    if source.name == "stdlib" and document.module in config.heldout_modules:
        return True
    return stable_hash("split", source.split_name, document.module) % config.heldout_one_in == 0


_MACHINE_MADE = re.compile(
    r"generated (by|from|using|with|code)|auto[- ]?generated|automatically generated|do not edit",
    re.IGNORECASE,
)
_LONGEST_LINE = 1000


def _unwanted(text: str, prompts: frozenset[str], seen: set[bytes]) -> str:
    """Why a text is left out ("" if it is not); adds the digest of one written by people."""
    if "\0" in text:
        return "binary"
    if not text.strip():
        return "empty"
    lines = text.splitlines()
    if max(map(len, lines)) > _LONGEST_LINE:
        return "very long lines"
    if _MACHINE_MADE.search(text[:1500]):
        return "generated"
    if sum(map(str.isdigit, text)) > 0.25 * len(text):
        return "mostly digits"
    if END_OF_TEXT in text:
        return f"contains {END_OF_TEXT}"
    if _is_duplicate(text, seen):
        return "duplicate"
    if prompts and not prompts.isdisjoint(map(_normalized, lines)):
        return "benchmark prompt"
    return ""


def _benchmark_lines(path: str) -> frozenset[str]:
    """Lines that give a benchmark problem away: its signature and its longer docstring lines."""
    if not path or not Path(path).is_file():
        return frozenset()
    lines: set[str] = set()
    for problem in jsonl_records(Path(path)):
        if isinstance(problem, str) or not isinstance(problem.get("prompt"), str):
            raise DataError(f"{path} has a line without a prompt; correct data.benchmark")
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
    licences: dict[str, set[str]] = {}
    for split in SPLITS:
        for document in getattr(corpus, split):
            source = document.source
            row = rows.setdefault(
                source.name,
                {"version": source.version, "licence": "", "repeats": source.repeats}
                | {f"{s}_{unit}": 0 for s in SPLITS for unit in ("files", "bytes")},
            )
            row[f"{split}_files"] += 1
            row[f"{split}_bytes"] += document.size
            licences.setdefault(source.name, set()).add(document.licence)
            row["licence"] = ", ".join(sorted(licences[source.name]))
    return {
        "sources": rows,
        "skipped": dict(sorted(corpus.skipped.items())),
        "heldout_modules": sorted({f"{d.source.name}: {d.module}" for d in corpus.heldout}),
        "benchmark_checked": bool(_benchmark_lines(config.benchmark)),
    }
