"""Looking at one text: its page, colours and statistics, and the session that asks for more."""

import logging
import re

import numpy as np
import pytest
from browser import CHROMIUM, HOSTILE, Page, chromium
from rich.control import strip_control_codes

import ssd_jax
from ssd_jax import decode_command, progress, shipped, show
from ssd_jax.generate import encode_prompt
from ssd_jax.interactive import SETTINGS, Dialogue
from ssd_jax.pages import text
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.rounds import oracle_view

TINY = shipped.locate("python-tiny")
PROMPT = "def add(a, b):\n\t"
PLAN = Plan(
    width=6,
    drafts=(DraftPlan(rounds=2, width=2, branch=2),),
    ngram=NGramPlan(levels=2, width=3),
    depth=4,
    nodes=16,
    chunk=8,
)
OPTIONS = dict(max_new_tokens=24, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def stack():
    return ssd_jax.load("python-tiny")


@pytest.fixture(scope="module")
def result(stack):
    return ssd_jax.generate(stack, PROMPT, plan=PLAN, **OPTIONS)


@pytest.fixture(scope="module")
def page(stack, result, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "text.html"
    text.save(path, stack, PROMPT, result, PLAN, mode="staged", **OPTIONS)
    return path.read_text("utf-8")


def node(parent, token, stage="draft", accepted=False):
    fields = dict(parent=parent, token=token, stage=stage, probability=0.5)
    return fields | dict(evaluated=True, accepted=accepted)


def document(token="x", prompt="p"):
    """Two rounds, of two tokens and of one."""
    first = [node(-1, "p", "oracle", True), node(0, token, accepted=True), node(0, "no")]
    return {
        "prompt": prompt,
        "pieces": [(token, "draft"), ("y", "oracle"), ("z", "oracle")],
        "view": [(0.25, 2), (0.5, 1), (1e-9, 7000)],
        "trees": [first, [node(-1, "y", "oracle", True)]],
        "round_tokens": [2, 1],
        "figures": [("mode", "staged")],
        "lead": "Three tokens.",
    }


# --- The page ----------------------------------------------------------------------------


def test_the_page_shows_every_token_in_its_round_and_every_round_once(page, result):
    parsed = Page(page)
    tokens = [attrs for _, attrs in parsed.tags if "data-round" in attrs]
    rounds = [int(attrs["data-round"]) for attrs in tokens]
    assert np.bincount(rounds).tolist() == result.stats.round_tokens
    classes = [attrs["class"].split()[1] for attrs in tokens]
    assert classes == result.origins
    assert all(
        re.search(r"round \d+; .* gives it \S+\s%, rank [\d,]+$", a["title"]) for a in tokens
    )
    captions = re.findall(r"Round (\d+): \d+ nodes, \d+ in the oracle’s pass, (\d+) acc", page)
    accepted = [int(count) for _, count in captions]
    assert len(accepted) == result.stats.rounds
    # Each round ends in a token of the oracle's own, unless the limit cut it off.
    assert accepted[:-1] == [count - 1 for count in result.stats.round_tokens[:-1]]
    assert f"{result.stats.tokens_per_oracle_pass:.2f} a pass" in parsed.text


def test_hostile_texts_are_inert_and_nothing_is_loaded():
    made = document(HOSTILE, HOSTILE) | {"lead": HOSTILE, "figures": [(HOSTILE, HOSTILE)]}
    page = text.render(made)
    parsed = Page(page)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 1 and not {"img", "link", "iframe"} & set(names)
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert HOSTILE in parsed.texts, "and shown as they are"
    assert not [name for _, attrs in parsed.tags for name in attrs if name in ("src", "href")]
    assert not re.search(r"url\(|@import|https?://", page)


def test_a_token_tells_its_stage_probability_and_rank():
    titles = [a["title"] for _, a in Page(text.render(document())).tags if "data-round" in a]
    assert titles[0] == "x – proposed by the draft, round 1; the oracle gives it 25\xa0%, rank 2"
    assert titles[2].endswith(
        "written by the oracle, round 2; the oracle gives it 1e\u221207\xa0%, rank 7,000"
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_keys_step_through_the_rounds(tmp_path):
    """The arrow key steps on; a token that is chosen shows its round and tells its figures."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", text.render(document()))  # lets this script run
    keys = """
    const press = () => document.body.dispatchEvent(
      new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true, cancelable: true}));
    const shown = () => [...document.querySelectorAll(".round")].map((r) => r.hidden ? 0 : 1);
    const seen = [shown()];
    press(); seen.push(shown());
    press(); seen.push(shown());
    // Not .focus(): a browser that starts slowly may not have given the page its focus yet.
    document.querySelector("[data-round='0']").dispatchEvent(new FocusEvent("focus"));
    seen.push(shown());
    document.title = JSON.stringify(seen) + document.getElementById("token").textContent;
    """
    path = tmp_path / "keys.html"
    path.write_text(page.replace("</body>", f"<script>{keys}</script></body>"), "utf-8")
    (title,) = re.findall(r"<title>(.*?)</title>", chromium(path, tmp_path, "--dump-dom"))[:1]
    assert title.startswith("[[1,0],[0,1],[0,1],[1,0]]x – proposed by the draft")


def test_the_oracles_view_is_its_distribution(stack, result):
    ids = encode_prompt(stack, PROMPT)
    scores = np.asarray(stack.oracle(np.array([[*ids, *result.tokens]]))[0][0], np.float64)
    scores = scores[len(ids) - 1 : -1]
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    view = oracle_view(stack, ids, result.tokens)
    for row, token, (probability, rank) in zip(expected, result.tokens, view, strict=True):
        assert probability == pytest.approx(row[token], rel=1e-3)
        assert rank == 1 + (row > row[token]).sum()


# --- The terminal ------------------------------------------------------------------------


def test_colours_only_where_they_show(stack, result, monkeypatch, capsys):
    assert not show.has_colors(), "a pipe"
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    assert show.has_colors()
    show.print_colored(stack, result, PROMPT)
    captured = capsys.readouterr()
    assert "\x1b[" in captured.out and "ngram" in captured.err
    plain = re.sub(r"\x1b\[[\d;]*m", "", captured.out)
    assert plain == strip_control_codes(PROMPT + result.text) + "\n", "tabs and lines untouched"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not show.has_colors()


def test_statistics_are_those_of_the_result(result, capsys):
    show.print_stats(result, mode="staged", temperature=0.7, seed=5)
    printed = capsys.readouterr()
    assert printed.out == ""
    for words in (
        f"{result.stats.tokens_per_oracle_pass:.2f}",
        f"oracle {result.stats.passes['oracle']}",
        "temperature 0.7, seed 5",
        f"{result.stats.new_tokens} (ended by: {result.finish_reason})",
    ):
        assert words in printed.err
    sizes = re.findall(r"(\d+) \((\d+)×\)", printed.err)
    assert sum(int(size) * int(count) for size, count in sizes) == result.stats.new_tokens


# --- The session -------------------------------------------------------------------------


@pytest.fixture
def session(stack, monkeypatch, tmp_path):
    monkeypatch.setenv("SSD_JAX_CACHE", str(tmp_path))
    args = decode_command.parse_args(
        ["-i", "--max-new-tokens", "24", "--temperature", "0.7", "--seed", "5"]
    )
    return Dialogue(stack, {name: getattr(args, name) for name in SETTINGS}, PLAN)


def talk(session, *lines):
    """Let a session read some lines; the end of the input comes after the last."""
    rest = list(lines)

    def read(ask):
        if not rest:
            raise EOFError
        return rest.pop(0)

    session.run(read)
    assert not rest or rest == list(lines)[-len(rest) :]
    return rest


def test_a_session_decodes_prompt_after_prompt(session, result, tmp_path, capsys):
    page = tmp_path / "page.html"
    talk(session, "def add(a, b):\\", "\t", f"/html {page}", "/more")
    out = capsys.readouterr().out
    assert out.startswith(result.text + "\n")
    assert len(out) > len(result.text) + 2
    assert f"{result.stats.tokens_per_oracle_pass:.2f} a pass" in page.read_text("utf-8")


def test_settings_change_and_what_is_wrong_changes_nothing(session, capsys):
    before = dict(session.settings)
    wrong = ("/temperature hot", "/mode turbo", "/top-p 2", "/color maybe", "/nonsense", "/more")
    left = talk(session, *wrong, "/seed 9", "/show", "/quit", "never read")
    assert left == ["never read"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(wrong)
    assert session.settings == before | {"seed": 9}


def test_a_prompt_that_is_refused_ends_no_session(session, capsys):
    talk(session, "x " * 3000, "/max-new-tokens 1", "/mode baseline", "def")
    captured = capsys.readouterr()
    assert "context" in captured.err and captured.out


def test_interactive_takes_no_prompt(capsys):
    for argv in (["-i", "x"], ["-i", "--json"], ["-i", "--html", "f"]):
        with pytest.raises(SystemExit) as end:
            decode_command.main(argv)
        assert end.value.code == 2 and "--interactive" in capsys.readouterr().err


# --- Progress ----------------------------------------------------------------------------


def test_progress_names_what_the_package_does_and_leaves_logging_as_it_was():
    logger = logging.getLogger("ssd_jax")
    before = logger.level, list(logger.handlers)
    with progress.stages("first") as status:
        shown = [str(status.status.__rich__())]
        ssd_jax.load(oracle=TINY / "oracle")
        shown.append(str(status.status.__rich__()))
    assert shown[0] == "first" and shown[1].startswith(f"loading {TINY / 'oracle'}")
    assert (logger.level, logger.handlers) == before
