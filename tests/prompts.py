"""Prompts for the shipped models: functions of held-out modules, and HumanEval if at hand."""

from __future__ import annotations

import ast
import gzip
import json
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TRIO = REPOSITORY / "checkpoints" / "python-small"
HUMANEVAL = REPOSITORY.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
# Held out by configs/python-small.toml.
MODULES = ("bisect", "heapq", "textwrap", "fractions", "statistics", "shlex", "graphlib")


def heldout(count: int) -> list[str]:
    """Signature and docstring of functions in held-out modules of the standard library."""
    found = []
    for module in MODULES:
        source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text("utf-8")
        lines = source.splitlines()
        functions = [
            node
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        ]
        for node in functions:
            prompt = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
            if len(prompt) < 600:
                found.append(prompt)
    assert len(found) >= count
    return found[:: len(found) // count][:count]


def humaneval(count: int) -> list[str]:
    """The first prompts of HumanEval; empty where the file is not at hand."""
    if not HUMANEVAL.is_file():
        return []
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for _, line in zip(range(count), file, strict=False)]
