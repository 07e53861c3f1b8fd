"""The documents name what exists."""

import ast
import re

import pytest
from prompts import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_and_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text):
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name in functions, f"{file}::{name}"
    for file in re.findall(r"`((?:ssd_jax|scripts|configs|docs|checkpoints)/[\w./-]+)`", text):
        assert (REPOSITORY / file).exists(), file
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link


def test_every_feature_of_ours_is_held_by_a_test():
    text = (REPOSITORY / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    ours = [[cell.strip() for cell in row] for row in rows if len(row) == 12]
    assert len(ours) > 20
    for feature, *_, own, test in ours[1:]:
        assert own in ("no", "training only") or "tests/" in test, feature
