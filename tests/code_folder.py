"""A folder of code for the training tests."""

from __future__ import annotations

from pathlib import Path

VERBS = ("add", "sub", "mul", "scale", "shift", "clamp", "merge", "split", "sort", "count")


def write_code(folder: Path, packages: int = 12) -> Path:
    """A folder of small, alike, distinct modules: easy to learn, enough for both splits."""
    for package in range(packages):
        for verb in VERBS:
            lines = [f'"""{verb} of package {package}."""']
            for k in range(4):
                lines.append(f"def {verb}_{package}_{k}(self, value):\n    return value * {k}\n")
            path = folder / f"p{package}" / f"{verb}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(lines))
    return folder
