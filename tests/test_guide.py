"""docs/guide.md: its snippets run, one after another, and their assertions hold."""

import re

from prompts import REPOSITORY

from ssd_jax.plan import NGramPlan, Plan


def test_the_snippets_of_the_guide_run(monkeypatch, capsys):
    # The smallest trio and look-up alone, quick to compile: what the guide says depends on neither.
    small = Plan(width=3, ngram=NGramPlan(levels=1, branch=0), depth=2, nodes=4)
    monkeypatch.setattr(Plan, "staged", lambda *_: small)
    monkeypatch.setattr(Plan, "on_cpu", lambda plan, *_, **__: plan)
    monkeypatch.chdir(REPOSITORY)
    guide = (REPOSITORY / "docs" / "guide.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    names: dict = {}
    for snippet in snippets:
        exec(snippet.replace("python-small", "python-tiny"), names)
    assert len(snippets) == 8
    written = len(names["stack"].tokenizer.encode(names["prompt"]) + names["first"].tokens)
    assert names["second"].stats.reused_tokens == written - 1
    assert names["pieces"].result.text in capsys.readouterr().out
