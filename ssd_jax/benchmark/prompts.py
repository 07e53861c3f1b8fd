"""The prompts that are measured."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import zlib
from pathlib import Path

from ssd_jax.errors import DataError
from ssd_jax.files import first_line

HELDOUT, HUMANEVAL = "heldout", "humaneval"
_HUMANEVAL_HUB = "openai/openai_humaneval"
_HUMANEVAL_FILES = ("HumanEval.jsonl.gz", "HumanEval.jsonl")
_HUMANEVAL_FOLDERS = (".", "data", "data/humaneval", "../shared/data/humaneval")


def load_prompts(name: str, limit: int | None = None) -> list[str]:
    """The prompts that ``--prompts`` names.

    Args:
      name: ``heldout`` for the set that comes with the package, signatures and docstrings of
        functions of the standard library that the shipped models have not seen; ``humaneval``
        for OpenAI's, from ``HumanEval.jsonl[.gz]`` in or below the working folder or else from
        the Hugging Face hub; or a JSON-lines file (:func:`read_prompts`).
      limit: the first so many.

    Raises:
      DataError: see :func:`read_prompts`; or the hub has no HumanEval for us.
      OSError: the file cannot be opened.
    """
    if name == HELDOUT:
        with importlib.resources.as_file(
            importlib.resources.files("ssd_jax.benchmark") / "heldout.jsonl"
        ) as path:
            return read_prompts(path, limit)
    if name != HUMANEVAL:
        return read_prompts(name, limit)
    for folder in _HUMANEVAL_FOLDERS:
        for file in _HUMANEVAL_FILES:
            if (path := Path(folder) / file).is_file():
                return read_prompts(path, limit)
    return _from_hub()[:limit]


def _from_hub() -> list[str]:
    try:
        from datasets import load_dataset

        return list(load_dataset(_HUMANEVAL_HUB, split="test")["prompt"])
    except Exception as error:
        raise DataError(
            f"no {_HUMANEVAL_FILES[0]} here, and the Hugging Face hub gave none "
            f"({first_line(error)}); give --prompts the path of the file, or "
            "pip install '.[hub]' and check the connection"
        ) from error


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The ``prompt`` fields of a JSON-lines file, plain or gzipped (name ends in ``.gz``).

    Raises:
      DataError: a line is not an object with a string ``prompt``, or there is none at all.
      OSError: the file cannot be opened.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    prompts = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt_of(line, f"{path}, line {number}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); give UTF-8 JSON lines or .gz") from None
    if not prompts:
        raise DataError(f"{path} holds no prompt; give JSON lines with a field 'prompt'")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f"{where}: expected a JSON object with a string field 'prompt'")
    return prompt
