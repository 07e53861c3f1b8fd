#!/usr/bin/env python3
"""Write docs/dependencies.md: all that is installed with ssd-jax and its extras, with licences.

Run it in an environment that has the extras of `.ci/run`.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "hub", "test", "docs", "peers", "aot", "dev")
HEAD = """\
# Dependencies and their licences

What is installed with ssd-jax: "core" is all that decoding needs; the rest comes with the extra
named. Versions are those that continuous integration pins (`constraints.txt`); licences as the
packages declare them. Written by `python scripts/licences.py`.

| package | version | for | licence |
|---|---|---|---|
"""


def licence(info: Any) -> str:
    """The SPDX expression, else the classifiers, else the first line of the free text."""
    if expression := info.get("License-Expression"):
        return expression
    kinds = [c.split(" :: ")[-1] for c in info.get_all("Classifier") or () if "License ::" in c]
    kinds = [kind for kind in kinds if kind != "OSI Approved"]
    return ", ".join(kinds) or (info.get("License") or "not declared").strip().splitlines()[0][:60]


def needed(package: str, extra: str) -> list[Requirement]:
    """What a package requires, with an extra of it (or none)."""
    texts = metadata.requires(package) or []
    parsed = map(Requirement, texts)
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})]


def closure(extra: str) -> set[str]:
    """Names of all that one extra installs."""
    found: set[str] = set()
    waiting = [("ssd-jax", extra)]
    while waiting:
        package, wanted = waiting.pop()
        for requirement in needed(package, wanted):
            name = canonicalize_name(requirement.name)
            try:
                metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue  # for another platform
            if name not in found:
                found.add(name)
                waiting += [(name, each) for each in ("", *requirement.extras)]
    return found - {"ssd-jax"}


def main() -> None:
    core = closure("")
    user = {name: "core" for name in core}
    for extra in EXTRAS:
        for name in closure(extra):
            user.setdefault(name, extra)
    rows = []
    for name in sorted(user):
        info = metadata.metadata(name)
        rows.append(f"| {name} | {info['Version']} | {user[name]} | {licence(info)} |\n")
    (ROOT / "docs" / "dependencies.md").write_text(HEAD + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
