"""The summary as a table and in sentences, for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ssd_jax.benchmark.measure import Record
from ssd_jax.benchmark.summary import Summary


def summary_tables(summary: Summary) -> list[Table]:
    """Rich tables, one a sampling, with a row a mode; at most 80 columns wide."""
    columns = {
        "tokens/s": ("tokens_per_second", "{:.0f}"),
        "speed-up": ("speedup", "{:.2f}x"),
        "tokens/pass": ("tokens_per_oracle_pass", "{:.2f}"),
        "bandwidth": ("relative_bandwidth", "{:.2f}"),
        "overhead": ("overhead_share", "{:.0%}"),
    }
    tables = []
    for sampling, modes in summary.items():
        table = Table(title=sampling, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
        table.add_column("mode", no_wrap=True)
        for heading in (*columns, "exact"):
            table.add_column(heading, justify="right", no_wrap=True)
        for mode, figures in modes.items():
            cells = [
                "-" if figures[field] is None else form.format(figures[field])
                for field, form in columns.values()
            ]
            match = figures["exact_match"]
            table.add_row(mode, *cells, "-" if match is None else f"{match[0]}/{match[1]}")
        tables.append(table)
    return tables


def remarks(document: Record) -> list[str]:
    """What the reader of the table must know of models and texts, in sentences."""
    lines = []
    parameters = document["conditions"]["parameters"]
    for name, count in list(parameters.items())[1:]:
        lines.append(
            f"The oracle has {parameters['oracle'] / count:.1f} times {name}'s parameters."
        )
    if document["conditions"]["label"]:
        lines.append(f"The oracle is {document['conditions']['label']}.")
    for sampling, modes in document["summary"].items():
        mode, figures = next(iter(modes.items()))
        characters = [
            f"{name} {own['characters_per_oracle_pass']:.1f}"
            for name, own in modes.items()
            if own["characters_per_oracle_pass"] is not None
        ]
        lines.append(
            f"{sampling}: {figures['repetitive_share']:.0%} of the {mode} texts repeat an 8-gram "
            f"more than 4 times, {figures['ended_share']:.0%} end by themselves; characters per "
            f"oracle pass: {', '.join(characters) or 'unknown'}."
        )
    return lines
