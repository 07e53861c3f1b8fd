"""The benchmark's records, and its summary recomputed by hand."""

import gzip
import json

import pytest
import toys
from test_cli import make_result

import ssd_jax
from ssd_jax import benchmark, cli
from ssd_jax.errors import DataError

MODES = ("baseline", "staged")


def record(prompt, mode, seconds, tokens, oracle, repeat=0, bandwidth=0.5, characters=8):
    return {
        "prompt": prompt,
        "mode": mode,
        "sampling": "greedy",
        "repeat": repeat,
        "seconds": seconds,
        "new_tokens": len(tokens),
        "characters": characters,
        "tokens": tokens,
        "finish_reason": "length",
        "passes": {"oracle": oracle},
        "relative_bandwidth": bandwidth,
    }


def two_prompts():
    """Prompt 0 has 4 tokens and prompt 1 has 2; two repeats of each."""
    long, short = [1, 2, 3, 4], [5, 6]
    return [
        record(0, "baseline", 4.0, long, 4, 0, 1.0),
        record(0, "staged", 1.0, long, 2, 0, 0.4),
        record(0, "baseline", 8.0, long, 4, 1, 1.0),
        record(0, "staged", 2.0, long, 2, 1, 0.4),
        record(1, "baseline", 2.0, short, 2, 0, 1.0),
        record(1, "staged", 1.0, short, 1, 0, 0.7),
        record(1, "baseline", 2.0, short, 2, 1, 1.0),
        record(1, "staged", 2.0, short, 1, 1, 0.7),
    ]


def test_summary_by_hand():
    summary = benchmark.summarize(two_prompts())["greedy"]
    base, staged = summary["baseline"], summary["staged"]
    # 6 tokens; medians 6 s and 2 s against 1.5 s and 1.5 s.
    assert base["tokens_per_second"] == pytest.approx(6 / 8)
    assert staged["tokens_per_second"] == pytest.approx(6 / 3)
    assert base["speedup"] == 1.0
    assert staged["speedup"] == pytest.approx(8 / 3)
    assert (base["tokens_per_oracle_pass"], staged["tokens_per_oracle_pass"]) == (1.0, 2.0)
    assert staged["characters_per_oracle_pass"] == pytest.approx(16 / 3)
    assert staged["relative_bandwidth"] == pytest.approx((0.4 * 4 + 0.7 * 2) / 6)
    assert staged["exact_match"] == [2, 2]


@pytest.mark.parametrize("repeat", [0, 1])
def test_one_altered_token_shows(repeat):
    records = two_prompts()
    (altered,) = (
        r for r in records if (r["prompt"], r["mode"], r["repeat"]) == (1, "staged", repeat)
    )
    altered["tokens"] = [5, 7]
    assert benchmark.summarize(records)["greedy"]["staged"]["exact_match"] == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "repetitive"),
    [
        (list(range(40)), False),
        (list(range(8)) * 4, False),
        (list(range(8)) * 5, True),
        ([7] * 11, False),  # four 8-grams, all the same
        ([7] * 12, True),
        ([1, 2], False),
    ],
)
def test_a_text_that_repeats_an_8_gram_more_than_4_times_is_repetitive(tokens, repetitive):
    assert benchmark.is_repetitive(tokens) == repetitive


def test_repetitive_and_ended_texts_are_counted():
    records = [record(0, "baseline", 1.0, [7] * 12, 12), record(1, "baseline", 1.0, [1, 2], 2)]
    records[1]["finish_reason"] = "eos"
    figures = benchmark.summarize(records)["greedy"]["baseline"]
    assert figures["repetitive_share"] == figures["ended_share"] == 0.5


def test_a_useless_draft_shows_as_a_slow_down():
    records = [record(0, "baseline", 1.0, [1], 1), record(0, "staged", 4.0, [1], 1)]
    assert benchmark.summarize(records)["greedy"]["staged"]["speedup"] == 0.25


def test_interrupted_between_modes_compares_common_prompts_only():
    records = two_prompts()[:4] + [record(1, "baseline", 100.0, [5, 6], 2)]
    staged = benchmark.summarize(records)["greedy"]["staged"]
    assert staged["speedup"] == pytest.approx(6 / 1.5)
    assert staged["exact_match"] == [1, 1]


def test_without_baseline_or_tokenizer_there_is_null_instead_of_a_guess():
    records = [record(0, "staged", 1.0, [1], 1, characters=None)]
    figures = benchmark.summarize(records)["greedy"]["staged"]
    assert figures["speedup"] is None
    assert figures["exact_match"] is None
    assert figures["characters_per_oracle_pass"] is None


def test_a_run_that_compiled_is_repeated_and_modes_take_turns():
    calls = []

    def generate(prompt, *, mode, seed, **options):
        compiles = (mode, options["temperature"]) not in {call[1:3] for call in calls}
        calls.append((prompt, mode, options["temperature"], options.get("top_k"), seed))
        return make_result(seconds=50.0 if compiles else 2.0, compile_seconds=3.0 * compiles)

    options = dict(modes=MODES, samplings=("greedy", "topk50"), repeats=2, seed=10)
    records = list(benchmark.run(generate, ["a", "b"], **options))
    assert len(calls) == len(records) + 4, "each program compiled once, and ran again"
    assert {r["seconds"] for r in records} == {2.0}
    assert [r["mode"] for r in records] == list(MODES) * 8
    assert [(r["prompt"], r["sampling"], r["repeat"]) for r in records[::2]] == [
        (prompt, sampling, repeat)
        for prompt in (0, 1)
        for sampling in ("greedy", "topk50")
        for repeat in (0, 1)
    ]
    assert {call[2:4] for call in calls} == {(0.0, None), (1.0, 50)}
    assert {(call[0], call[4]) for call in calls} == {("a", 10), ("b", 11)}


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_prompts_are_read_up_to_the_limit(tmp_path, name):
    lines = "".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in ("a\n", "é", "c"))
    raw = lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert benchmark.read_prompts(tmp_path / name) == ["a\n", "é", "c"]
    assert benchmark.read_prompts(tmp_path / name, limit=2) == ["a\n", "é"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"{", b"[1]\n", b'{"text": "x"}', b'{"prompt": 3}', b'{"prompt": "\xff"}'],
)
def test_bad_prompt_files_are_refused(tmp_path, content):
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        with pytest.raises(DataError, match=path.name):
            benchmark.read_prompts(path)


@pytest.mark.parametrize("cut", [1, 12, 25])
def test_damaged_gzip_is_refused(tmp_path, cut):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hello world"}\n')[:cut])
    with pytest.raises(DataError):
        benchmark.read_prompts(path)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return path


def use_engine(monkeypatch, generate, checkpoint):
    stack = toys.stack()
    monkeypatch.setattr(ssd_jax, "load", lambda *_, **__: stack, raising=False)
    monkeypatch.setattr(ssd_jax, "generate", generate, raising=False)
    monkeypatch.setattr(cli, "shipped_checkpoint", lambda: checkpoint)


def test_command_writes_results_whose_summary_follows_from_its_records(
    monkeypatch, tmp_path, prompts_file, capsys
):
    use_engine(monkeypatch, lambda *_, **__: make_result(), tmp_path)
    out = tmp_path / "new" / "folder"
    argv = ["--prompts", str(prompts_file), "--out", str(out), "--sampling", "greedy,topk50"]
    assert benchmark.main(argv) == 0
    document = json.loads((out / "results.json").read_text())
    assert document["schema"] == 1
    assert len(document["records"]) == 2 * 2 * 3
    assert document["summary"] == benchmark.summarize(document["records"])
    assert document["conditions"]["prompts"] == "prompts.jsonl"
    assert document["conditions"]["backend"] == "cpu"
    assert document["conditions"]["dtype"] == "float32"
    assert str(tmp_path) not in json.dumps(document), "no path of this machine is recorded"
    assert [path.name for path in out.iterdir()] == ["results.json"]
    printed = capsys.readouterr().out
    assert "2/2" in printed and "times draft's parameters" in printed and "8-gram" in printed


def test_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, prompts_file):
    calls = []

    def generate(*_, **__):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return make_result()

    use_engine(monkeypatch, generate, tmp_path)
    assert benchmark.main(["--prompts", str(prompts_file), "--out", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 4


def test_a_failed_write_leaves_the_old_results(tmp_path):
    path = benchmark.write_results(tmp_path, {"schema": 1})
    with pytest.raises(ValueError):
        benchmark.write_results(tmp_path, {"figure": float("nan")})
    assert json.loads(path.read_text()) == {"schema": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--modes baseline,turbo", "turbo"),
        ("--sampling greedy,", "--sampling"),
        ("--limit 0", "--limit"),
        ("--repeats 0", "--repeats"),
    ],
)
def test_bad_arguments(capsys, arguments, names):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["--prompts", "p.jsonl", *arguments.split()])
    assert exit.value.code == 2
    assert names in capsys.readouterr().err


def test_missing_prompts_file(capsys):
    assert benchmark.main(["--prompts", "absent.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: absent.jsonl: ")
