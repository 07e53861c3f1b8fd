"""Single Python functions cut out of files: what a code completer is asked to write."""

from __future__ import annotations

import ast
import contextlib
import gc
import textwrap
import warnings
from collections.abc import Iterator

LEAST_BODY, MOST_LINES = 5, 60


def documented_functions(text: str) -> list[str]:
    """The functions and methods of a Python file that have a docstring and a body, dedented.

    Functions inside functions are left to their parents; decorators are left out, and so are
    functions of more than :data:`MOST_LINES` lines, or of fewer than :data:`LEAST_BODY` after
    the docstring: a model that has seen many of those answers everything with ``return True``.
    A text that is no Python has none.
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
        if not ast.get_docstring(node, clean=False) or node.end_lineno is None:
            continue
        body = node.end_lineno - (node.body[0].end_lineno or 0)
        if body < LEAST_BODY or node.end_lineno - node.lineno >= MOST_LINES:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        # A line of a string that sticks out to the left keeps the rest from being dedented.
        if source.startswith(("def ", "async def ")):
            yield source


def function_beginning(source: str) -> str:
    """Signature and docstring of a function, up to and with the newline before its body.

    Args:
      source: what :func:`documented_functions` returns; anything else has no beginning ("").
    """
    if not source.startswith(("def ", "async def ")):
        return ""
    try:
        function = ast.parse(source).body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    return "".join(source.splitlines(keepends=True)[: function.body[0].end_lineno])


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
