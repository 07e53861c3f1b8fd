"""Token trees, laid out here and drawn by the page, in its colours."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ssd_jax.pages.wording import stage_class, stage_label, visible

Record = dict[str, Any]
Node = Mapping[str, Any]


def drawn_rounds(
    trees: Sequence[Sequence[Node]], pieces: Sequence[tuple[str, str]]
) -> list[Record]:
    """A text's rounds, each drawn.

    Args:
      trees: of its first rounds, as of :func:`ssd_jax.rounds.round_trees`.
      pieces: text and stage of each of its tokens.
    """
    rounds, committed = [], 0
    for place, tree in enumerate(trees):
        drafted = [node for node in tree if node["accepted"] and node["parent"] >= 0]
        committed += len(drafted) + 1
        own = None  # the oracle's own token, if the text did not end before it
        if place + 1 < len(trees) and trees[place + 1]:
            own = trees[place + 1][0]["token"]
        elif committed <= len(pieces):
            own = pieces[committed - 1][0]
        rounds.append(
            draw_tree(tree, own)
            | {
                "size": len(tree),
                "evaluated": sum(node["evaluated"] for node in tree),
                "drafted": len(drafted),
                "own": own,
                "path": [(node["token"], node["stage"]) for node in drafted]
                + ([(own, "oracle")] if own is not None else []),
            }
        )
    return rounds


ROW, LABEL_HEIGHT, GAP, EM, LONGEST = 25.0, 19.0, 26.0, 7.25, 14


def draw_tree(tree: Sequence[Node], own: str | None = None) -> Record:
    """Places of a tree's nodes and edges: a column a depth, the accepted path in the first row.

    Args:
      tree: nodes as of :func:`ssd_jax.rounds.round_trees`.
      own: the oracle's own token after the accepted path.
    """
    nodes: list[Node] = list(tree)
    if own is not None:
        last = max((i for i, node in enumerate(tree) if node["accepted"]), default=-1)
        nodes.append({"parent": last, "token": own, "stage": "oracle", "own": True})
    children: dict[int, list[int]] = {}
    depths: list[int] = []
    for i, node in enumerate(nodes):
        depths.append(depths[node["parent"]] + 1 if node["parent"] >= 0 else 0)
        children.setdefault(node["parent"], []).append(i)
    rows = _rows(nodes, children)
    labels = [visible(node["token"], LONGEST) for node in nodes]
    widths = [_width(label) for label in labels]
    columns, right = [], 2.0
    for depth in range(max(depths, default=0) + 1):
        columns.append(right)
        right += GAP + max((w for w, d in zip(widths, depths, strict=True) if d == depth))
    drawn, edges = [], []
    for i, node in enumerate(nodes):
        x, y, parent = columns[depths[i]], 2 + ROW * rows[i] + LABEL_HEIGHT / 2, node["parent"]
        state = _state(node)
        drawn.append(
            {
                "x": round(x, 1),
                "y": y,
                "width": round(widths[i], 1),
                "label": labels[i],
                "title": _node_title(node),
                "classes": f"{stage_class(node['stage'])} {state}",
            }
        )
        if parent >= 0:
            x0 = columns[depths[parent]] + widths[parent]
            y0 = 2 + ROW * rows[parent] + LABEL_HEIGHT / 2
            turn = f"H{x - 12:.1f}V{y - 5:g}q0 5 5 5" if y > y0 else ""
            edges.append({"path": f"M{x0:.1f} {y0:g}{turn}H{x:.1f}", "state": state})
    edges.sort(key=lambda edge: _STATES.index(edge["state"]))
    drawn.sort(key=lambda node: (node["y"], node["x"]))
    return {
        "width": math.ceil(right - GAP + 2),
        "height": math.ceil(4 + ROW * max(rows, default=0) + LABEL_HEIGHT),
        "nodes": drawn,
        "edges": edges,
    }


def _width(label: str) -> float:
    """Of a node, in a monospaced font."""
    return 14 + EM * sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in label)


_STATES = ("off", "seen", "taken")  # not in the oracle's pass; rejected by it; committed


def _state(node: Node) -> str:
    return (
        "taken" if node.get("own") or node["accepted"] else "seen" if node["evaluated"] else "off"
    )


def _rows(nodes: Sequence[Node], children: Mapping[int, list[int]]) -> list[int]:
    """The row of each node: a first child keeps its parent's, a later one opens a new one."""

    def rank(i: int) -> tuple[int, float]:
        return -_STATES.index(_state(nodes[i])), -nodes[i].get("probability", 1.0)

    rows, row = [0] * len(nodes), 0
    stack = [(i, place == 0) for place, i in enumerate(children.get(-1, []))][::-1]
    while stack:
        i, first = stack.pop()
        row += not first
        rows[i] = row
        below = sorted(children.get(i, []), key=rank)
        stack += [(child, place == 0) for place, child in enumerate(below)][::-1]
    return rows


def _node_title(node: Node) -> str:
    if node.get("own"):
        return f"{visible(node['token'])} – the oracle’s own token, committed"
    if node["parent"] < 0:
        return f"{visible(node['token'])} – the root, the newest token of the text"
    fate = {
        "off": "not evaluated by the oracle",
        "seen": "evaluated, rejected",
        "taken": "evaluated, accepted",
    }[_state(node)]
    p = node["probability"]
    words = (
        "below 0.0001 %" if p < 1e-6 else f"{100 * p:.1f} %" if p >= 1e-3 else f"{100 * p:.2g} %"
    )
    return (
        f"{visible(node['token'])} – {stage_label(node['stage'])}, path probability {words}, {fate}"
    )
