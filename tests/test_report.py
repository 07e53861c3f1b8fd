"""The benchmark's page: figures, hostile texts, missing parts, and what a browser makes of it."""

import copy
import html
import re
import struct

import pytest
from browser import CHROMIUM, HOSTILE, Page, chromium

from ssd_jax import files
from ssd_jax.benchmark import drawing, report
from ssd_jax.benchmark.summary import summarize
from ssd_jax.pages import trees, wording

STAGES = ["oracle", "draft", "ngram"]


def record(prompt, mode, sampling, seconds, tokens, rounds, origins):
    return {
        "prompt": prompt,
        "mode": mode,
        "sampling": sampling,
        "repeat": 0,
        "dtype": "bfloat16" if "bfloat16" in mode else "float32",
        "prompt_tokens": 5,
        "seconds": seconds,
        "compile_seconds": 0.0,
        "new_tokens": len(tokens),
        "characters": 3 * len(tokens),
        "tokens": tokens,
        "finish_reason": "length",
        "passes": {"oracle": len(rounds)},
        "round_tokens": rounds,
        "round_passes": {"oracle": [1] * len(rounds)},
        "round_widths": [8] * len(rounds),
        "origins": origins,
        "relative_bandwidth": 1.0 if mode == "baseline" else 0.31415,
        "min_margin": 0.0123,
    }


def node(parent, token, stage="draft", probability=0.5, evaluated=True, accepted=False):
    return {
        "parent": parent,
        "token": token,
        "stage": stage,
        "probability": probability,
        "evaluated": evaluated,
        "accepted": accepted,
    }


def example(index=0, sampling="greedy", prompt="def f(x):\n"):
    first = [
        node(-1, "\n", "oracle", 1.0, accepted=True),
        node(0, " wrong", "ngram", 0.4, evaluated=False),
        node(0, " right", "draft", 0.0423, accepted=True),
        node(2, "\t(", "ngram", 0.01),
    ]
    second = [node(-1, " own", "oracle", 1.0, accepted=True), node(0, " x", "ngram", 0.2)]
    return {
        "prompt_index": index,
        "sampling": sampling,
        "prompt": prompt,
        "pieces": [[" right", "draft"], [" own", "oracle"], ["\n    ", "oracle"]],
        "trees": [first, second],
        "tokens_per_oracle_pass": 1.5,
    }


def document():
    """Two prompts, two samplings, all three modes and a peer."""
    records = []
    for prompt, sampling in [(0, "greedy"), (1, "greedy"), (0, "topk50"), (1, "topk50")]:
        tokens = [1, 2, 3, 4]
        own = (("baseline", 2.0, [1] * 4, "0000"), ("speculative", 1.0, [2, 2], "1010"))
        for mode, seconds, rounds, origins in (*own, ("staged", 0.5 + prompt, [4], "2210")):
            records.append(record(prompt, mode, sampling, seconds, tokens, rounds, origins))
        unknown = (
            "characters",
            "round_tokens",
            "round_passes",
            "round_widths",
            "origins",
            "relative_bandwidth",
        )
        peer = dict.fromkeys((*unknown, "min_margin")) | {"passes": {}}
        records.append(record(prompt, "hf", sampling, 4.0, tokens, [], "") | peer)
    own = dict(width=8, seconds=0.1, prefill_width=4, prefill_seconds=0.1, narrower={"1": 0.0472})
    costs = {"staged": {"oracle": own}}
    return {
        "schema": 3,
        "conditions": {
            "date": "2026-11-21T15:22:54+00:00",
            "device": "AMD EPYC",
            "backend": "cpu",
            "cpu_count": 2,
            "load_average": 0.5,
            "python": "3.11.7",
            "versions": {"jax": "0.10.2", "torch": None},
            "commit": "e1a26368c4300daca0f532964e2567cd48e90f40-dirty",
            "stages": STAGES,
            "dtype": "float32",
            "parameters": {"oracle": 12813440, "draft": 1276704},
            "weight_bytes": {"oracle": 49943040, "draft": 4713600},
            "cache_bytes_per_token": {"oracle": 20480, "draft": 3072},
            "plans": {"staged": {"width": 8, "drafts": [{"rounds": 4}], "ngram": {"branch": 1}}},
            "models": {"checkpoint": "python-small", "oracle": None, "drafts": [], "ngram": None},
            "label": None,
            "prompts": "my prompts.jsonl",
            "limit": 2,
            "prompt_count": 2,
            "max_new_tokens": 4,
            "repeats": 1,
            "seed": 0,
        },
        "costs": costs,
        "records": records,
        "summary": summarize(records, costs),
        "examples": [example(), example(1, "topk50")],
        "peak_memory_bytes": 1_930_000_000,
    }


def rows(page):
    """Cells of every table row, as text."""
    return [
        [
            " ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split())
            for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr\b[^>]*>(.*?)</tr>", page, re.DOTALL)
    ]


# --- Content -----------------------------------------------------------------------------


def test_the_figures_of_the_document_appear():
    made = document()
    page = report.render(made)
    text, table = Page(page).text, rows(page)
    # 8 tokens; 4 s, 2 s and 2 s: twice the baseline's 2 tokens/s.
    (staged, _) = [row for row in table if row[0] == "staged" and len(row) == 11]
    assert staged[1:6] == ["4.0", "2.00× 1.33–4.00", "4.00", "12.0", "0.31"]
    assert staged[7:] == ["2 of 2", "0 %", "0 %", "0.012"]
    (peer, _) = [row for row in table if row[0] == "hf" and len(row) == 11]
    assert peer[1:] == ["1.0", "0.50×", "–", "–", "–", "–", "2 of 2", "0 %", "0 %", "–"]
    assert ["staged, oracle", "8", "100", "4", "100", ""] in table
    assert ["staged, oracle, narrower", "1", "47.2", "", "", ""] in table
    assert "All 8 texts of the drafting modes are identical" in text
    assert "4.00 tokens per oracle pass, 0.31 of plain decoding’s bytes per token" in text
    for words in ("2026-11-21 15:22 UTC", "AMD EPYC, 2 cores", "1.93 GB", "e1a26368c430, edited"):
        assert words in text
    assert "oracle 12.8M parameters, draft 1.28M parameters (10.0 times fewer)" in text
    assert "python 3.11.7, jax 0.10.2" in text and "torch" not in text


def test_the_paper_stands_beside_ours():
    table = rows(report.render(document()))
    paper = [row for row in table if row[0].endswith(": paper")]
    ours = [row for row in table if row[0].endswith(": here")]
    assert paper[0][1:] == ["1.00", "0.31", "0.23"]
    assert paper[1][1:] == ["1.00", "0.48", "0.35"]
    assert paper[2][1:] == ["150 (1.00×)", "350 (2.33×)", "475 (3.16×)"]
    assert paper[3][1:] == ["150 (1.00×)", "219 (1.46×)", "298 (1.98×)"]
    assert ours[0][1:] == ["1.00", "0.31", "0.31"]
    assert ours[2][1:] == ["2 (1.00×)", "4 (2.00×)", "4 (2.00×)"]


def test_texts_that_differ_stand_out():
    made = document()
    assert "✗" not in report.render(made)
    made["records"][2]["tokens"] = [1, 2, 3, 5]
    made["summary"] = summarize(made["records"], made["costs"])
    page = report.render(made)
    assert '<strong class="bad">✗ 1 of 2</strong>' in page
    assert '<tr class="fails">' in page
    assert "✗ 1 of 8 texts of the drafting modes differ" in Page(page).text
    assert "identical, token for token" not in page


def test_command_to_reproduce():
    made = document()
    assert report.command(made["conditions"], made["summary"]) == (
        "python scripts/benchmark.py --prompts 'my prompts.jsonl' --limit 2 "
        "--sampling greedy,topk50 --max-new-tokens 4 --repeats 1 --seed 0 --modes staged "
        "--peers hf --no-other-baseline --checkpoint checkpoints/python-small "
        "--dtype float32 --out results"
    )


def test_roofline_and_ablations_where_there_are_any():
    made = document()
    plain = report.render(made)
    assert 'id="roofline"' not in plain and 'id="ablations"' not in plain
    point = {"name": "staged: 8 tokens a pass", "intensity": 4.0, "flops": 2e9}
    made["roofline"] = {"bandwidth": 1e9, "flops": 1e11, "points": [point]}
    made["ablations"] = {
        "tree_shape": [
            {"variant": "chain", "tokens per oracle pass": 2.5, "identical": "3 of 3"},
            {"variant": "tree", "tokens per oracle pass": 3.14159, "identical": "2 of 3", "n": 7},
        ],
        "none": [],
    }
    page = report.render(made)
    table = rows(page)
    assert ["1 staged: 8 tokens a pass", "4", "2 Gflop/s", "50 %"] in table
    assert ["variant", "tokens per oracle pass", "identical", "n"] in table
    assert ["chain", "2.50", "3 of 3", "–"] in table
    assert ["tree", "3.14", "✗ 2 of 3", "7"] in table
    assert "<h3>tree shape</h3>" in page and "<h3>none</h3>" not in page


def test_texts_are_coloured_by_stage():
    page = report.render(document())
    assert '<span class="token draft" title="draft"> right</span>' in page
    assert '<span class="token oracle newline" title="oracle">\n    </span>' in page
    assert "oracle 67 %" in Page(page).text  # of the example
    assert "oracle 25 %, draft 25 %, n-gram 50 %" in Page(page).text  # of all staged records


# --- Plots and trees ---------------------------------------------------------------------


def test_tree_puts_the_accepted_path_in_the_first_row():
    drawn = trees.draw_tree(example()["trees"][0], " own")
    by_label = {node["label"]: node for node in drawn["nodes"]}
    top = [by_label[label] for label in ("⏎", "␣right", "␣own")]
    assert len({node["y"] for node in top}) == 1
    assert all("taken" in node["classes"] for node in top)
    assert [node["x"] for node in top] == sorted(node["x"] for node in top)
    assert by_label["⇥("]["classes"] == "ngram seen"
    assert by_label["␣wrong"]["classes"] == "ngram off"
    assert by_label["␣right"]["title"] == (
        "␣right – draft, path probability 4.2 %, evaluated, accepted"
    )
    places = {(node["x"], node["y"]) for node in drawn["nodes"]}
    assert len(places) == len(drawn["nodes"]) == 5
    assert len(drawn["edges"]) == 4
    for node_ in drawn["nodes"]:
        assert 0 <= node_["x"] <= drawn["width"] - node_["width"]
        assert 9.5 <= node_["y"] <= drawn["height"] - 9.5


def test_a_node_never_stands_on_another_nor_on_an_edge_of_its_row():
    # A root with three children, of which the middle one has two more.
    tree = [node(-1, "a", accepted=True), *(node(0, c) for c in "bcd"), node(2, "e"), node(2, "f")]
    drawn = trees.draw_tree(tree)
    at = {n["label"]: (n["x"], n["y"]) for n in drawn["nodes"]}
    assert at["a"][1] == at["b"][1] and at["c"][1] == at["e"][1]
    assert at["b"][1] < at["c"][1] < at["f"][1] < at["d"][1]


def test_speedups_per_prompt_are_over_the_fastest_baseline():
    made = document()
    swarms = drawing.swarm_plots(made)
    (greedy, _) = swarms["panels"]
    assert [row["mode"] for row in greedy["rows"]] == ["speculative", "staged"]
    titles = [title for *_, title in greedy["rows"][1]["dots"]]
    assert sorted(titles) == ["prompt 0: 4.00×", "prompt 1: 1.33×"]
    faster = [
        copy.deepcopy(r) | {"mode": "baseline-bfloat16", "seconds": 1.0}
        for r in made["records"]
        if r["mode"] == "baseline"
    ]
    made["records"] += faster
    made["summary"] = summarize(made["records"])
    (greedy, _) = drawing.swarm_plots(made)["panels"]
    assert greedy["over"] == "baseline-bfloat16"
    assert "prompt 0: 2.00×" in [title for *_, title in greedy["rows"][1]["dots"]]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (drawing.Axis(0, 3.2, 0, 1), [0, 1, 2, 3]),
        (drawing.Axis(0, 1, 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (drawing.Axis(0, 12, 0, 1), [0, 2, 4, 6, 8, 10, 12]),
        (drawing.Axis(0.5, 2000, 0, 1, log=True), [1, 10, 100, 1000]),
        (drawing.Axis(0.5, 9, 0, 1, log=True), [0.5, 1, 2, 5]),
    ],
)
def test_ticks_are_round(axis, expected):
    assert axis.ticks() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("token", "shown"), [(" a\n", "␣a⏎"), ("\t\x00", "⇥␀"), ("", "∅"), ("abcdef", "abc…")]
)
def test_white_space_is_to_be_seen(token, shown):
    assert wording.visible(token, 4) == shown


# --- Safety ------------------------------------------------------------------------------


def hostile_document():
    made = document()
    made["conditions"] |= {"device": HOSTILE, "prompts": HOSTILE, "label": HOSTILE, "x": HOSTILE}
    made["examples"] = [example(prompt=HOSTILE)]
    made["examples"][0]["pieces"] = [[HOSTILE, "draft"], [HOSTILE, HOSTILE]]
    made["examples"][0]["trees"][0][1]["token"] = HOSTILE
    made["ablations"] = {HOSTILE: [{HOSTILE: HOSTILE}]}
    made["peers"] = {"hf": {"setting": HOSTILE, "skipped": {HOSTILE: HOSTILE}}}
    made["summary"][HOSTILE] = {HOSTILE: made["summary"]["greedy"]["staged"]}
    return made


def test_hostile_texts_are_inert():
    page = Page(report.render(hostile_document()))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert HOSTILE in page.texts, "and shown as they are"


def test_the_page_loads_nothing():
    page = report.render(document())
    assert not re.search(r"url\(|@import|@font-face", page)
    parsed = Page(page)
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not attrs.get("src")
        assert (attrs.get("href") or "#").startswith("#")
    assert "http://" not in page and "https://" not in page
    (policy,) = (a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    "lacking",
    ["conditions", "costs", "records", "summary", "examples", "peak_memory_bytes", "everything"],
)
def test_a_document_with_missing_parts_renders(lacking):
    made = document()
    for name in list(made) if lacking == "everything" else [lacking]:
        del made[name]
    page = report.render(made)
    assert "The paper, row by row" in page
    assert not re.search(r"Undefined|None\b|\bnan\b", Page(page).text)


@pytest.mark.parametrize("modes", [["baseline"], ["staged"], ["hf"], ["baseline", "speculative"]])
def test_any_choice_of_modes_renders(modes):
    made = document()
    made["records"] = [r for r in made["records"] if r["mode"] in modes]
    made["summary"] = summarize(made["records"])
    made |= {"examples": [], "costs": {}}
    page = report.render(made)
    for mode in modes:
        assert [row for row in rows(page) if row[0] == mode]
    assert 'id="trees"' not in page


def test_figures_that_are_null_render_as_dashes():
    made = document()
    for modes in made["summary"].values():
        for own in modes.values():
            own.update(dict.fromkeys(own))
    (staged, _) = [r for r in rows(report.render(made)) if r[0] == "staged" and len(r) == 11]
    assert staged[1:] == ["–"] * 10


def test_writing_is_atomic(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    path = report.write(folder, document())
    assert path == folder / "report.html" and path.read_text("utf-8").startswith("<!doctype html>")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(folder, {})
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["report.html"]


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    made = document()
    made["examples"][0]["prompt"] = "\ud83d"
    report.write(tmp_path, made).read_text("utf-8")


# --- In a browser ------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_rounds_are_chosen_and_hostile_texts_inert(tmp_path):
    made = hostile_document()
    made["examples"].append(example(1, "topk50"))
    path = report.write(tmp_path, made)
    page = Page(chromium(path, tmp_path, "--dump-dom"))
    controls = [a for t, a in page.tags if "controls" in a.get("class", "")]
    assert len(controls) == 3 and not any("hidden" in attrs for attrs in controls)
    viewers = [attrs for _, attrs in page.tags if attrs.get("class") == "viewer"]
    assert ["hidden" in attrs for attrs in viewers] == [False, True]
    rounds = [attrs for _, attrs in page.tags if attrs.get("class") == "round"]
    assert ["hidden" in attrs for attrs in rounds] == [False, True] * 2
    assert "img" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_round_that_is_chosen_shows(tmp_path):
    """Chooses the second text and its second round as a user's click would."""
    page = report.render(document())
    clicks = """
    const text = document.getElementById("example");
    text.value = "1"; text.dispatchEvent(new Event("change"));
    document.querySelector('input[name="round-1"][value="1"]').click();
    const first = document.querySelectorAll(".round")[3].querySelector(".tree g");
    first.focus();
    first.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
    """
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)  # it would not let this script run
    path = tmp_path / "clicked.html"
    path.write_text(page.replace("</body>", f"<script>{clicks}</script></body>"), "utf-8")
    shown = chromium(path, tmp_path, "--dump-dom")
    tags = Page(shown).tags
    viewers = [attrs for _, attrs in tags if attrs.get("class") == "viewer"]
    assert ["hidden" in attrs for attrs in viewers] == [True, False]
    rounds = [attrs for _, attrs in tags if attrs.get("class") == "round"]
    assert ["hidden" in attrs for attrs in rounds] == [False, True, True, False]
    details = re.findall(r'<p class="note detail"[^>]*>(.*?)</p>', shown)
    assert details[:3] == [""] * 3
    assert "the oracle’s own token" in details[3]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("size", ["1200,3000", "500,3000"])
def test_screenshot(tmp_path, size):
    path = report.write(tmp_path, document())
    picture = tmp_path / "page.png"
    chromium(path, tmp_path, f"--window-size={size}", f"--screenshot={picture}")
    raw = picture.read_bytes()
    assert struct.unpack(">II", raw[16:24]) == tuple(map(int, size.split(",")))
    assert len(raw) > 50_000, "a blank page takes far less"
