"""Single Python functions cut out of files: what a code completer is asked to write."""

from __future__ import annotations

import ast
import contextlib
import gc
import textwrap
import warnings
from collections.abc import Iterator

LEAST_LINES, MOST_LINES = 4, 60


def documented_functions(text: str) -> list[str]:
    """The functions and methods of a Python file that have a docstring and a body, dedented.

    Functions inside functions are left to their parents; decorators, and functions of fewer
    than :data:`LEAST_LINES` or more than :data:`MOST_LINES` lines, are left out. A text that is
    no Python has none.
    """
    with _no_collection():  # until the tree is gone again
        return list(_documented_functions(text))


def _documented_functions(text: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old code
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.split("\n")
    for node in _outermost_functions(tree):
        count = (node.end_lineno or 0) - node.lineno + 1
        if not LEAST_LINES <= count <= MOST_LINES or not _has_docstring_and_body(node):
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        # A line of a string that sticks out to the left keeps the rest from being dedented.
        if source.startswith(("def ", "async def ")):
            yield source


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: it takes longer than parsing does.

    A syntax tree is many new objects, without a cycle among them, that it visits over and over.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _outermost_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """In the order of the text. Not recursive: a chain of ``elif`` nests as deep as it is long."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif not isinstance(node, ast.expr):  # no function statement within
            pending += reversed(list(ast.iter_child_nodes(node)))


def _has_docstring_and_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    docstring = ast.get_docstring(node, clean=False)
    body = [item for item in node.body[1:] if not isinstance(item, ast.Pass)]
    return bool(docstring) and bool(body)
