"""The tutorial does what it says: its blocks of Python run in order, and their assertions hold."""

import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


def test_the_tutorial_runs(capsys):
    # The smaller trio of the two: most of the time is compiling, which layers and tokens cost.
    text = TUTORIAL.read_text("utf-8").replace('"python-small"', '"python-tiny"')
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    names: dict = {}
    for block in blocks:
        # Padded, so that a traceback tells the line of the tutorial.
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(TUTORIAL), "exec"), names)
    assert names["result"].text in capsys.readouterr().out
