"""The benchmark's records, and its summary recomputed by hand."""

import ast
import dataclasses
import gzip
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import toys
from prompts import REPOSITORY, TRIO
from test_cli import make_result

import ssd_jax
from ssd_jax.benchmark import ablations, command, measure, peers, results, schemes
from ssd_jax.benchmark.alone import PassesAlone
from ssd_jax.benchmark.prompts import load_prompts, read_prompts
from ssd_jax.benchmark.summary import by_prompt, is_repetitive, speedups, summarize
from ssd_jax.errors import DataError
from ssd_jax.pacing import TRIAL
from ssd_jax.plan import MODES as ALL_MODES
from ssd_jax.plan import Plan
from ssd_jax.rounds import round_trees

MODES = ("baseline", "staged")


def record(prompt, mode, seconds, tokens, oracle, repeat=0, bandwidth=0.5, characters=8):
    return {
        "prompt": prompt,
        "mode": mode,
        "sampling": "greedy",
        "repeat": repeat,
        "dtype": "float32",
        "seconds": seconds,
        "new_tokens": len(tokens),
        "characters": characters,
        "tokens": tokens,
        "finish_reason": "length",
        "prompt_tokens": 9,
        "compile_seconds": 0.0,
        "passes": {"oracle": oracle},
        "round_tokens": [len(tokens)],
        "round_passes": {"oracle": [oracle]},
        "round_widths": [4],
        "origins": "0" * len(tokens),
        "relative_bandwidth": bandwidth,
        "min_margin": 0.5,
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
    summary = summarize(two_prompts())["greedy"]
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
    assert summarize(records)["greedy"]["staged"]["exact_match"] == [1, 2]


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
    assert is_repetitive(tokens) == repetitive


def test_repetitive_and_ended_texts_are_counted():
    records = [record(0, "baseline", 1.0, [7] * 12, 12), record(1, "baseline", 1.0, [1, 2], 2)]
    records[1]["finish_reason"] = "eos"
    figures = summarize(records)["greedy"]["baseline"]
    assert figures["repetitive_share"] == figures["ended_share"] == 0.5


def test_a_useless_draft_shows_as_a_slow_down():
    records = [record(0, "baseline", 1.0, [1], 1), record(0, "staged", 4.0, [1], 1)]
    assert summarize(records)["greedy"]["staged"]["speedup"] == 0.25


def test_interrupted_between_modes_compares_common_prompts_only():
    records = two_prompts()[:4] + [record(1, "baseline", 100.0, [5, 6], 2)]
    staged = summarize(records)["greedy"]["staged"]
    assert staged["speedup"] == pytest.approx(6 / 1.5)
    assert staged["exact_match"] == [1, 1]


def test_without_baseline_or_tokenizer_there_is_null_instead_of_a_guess():
    records = [record(0, "staged", 1.0, [1], 1, characters=None)]
    figures = summarize(records)["greedy"]["staged"]
    assert figures["speedup"] is None
    assert figures["exact_match"] is None
    assert figures["characters_per_oracle_pass"] is None


def test_speed_ups_are_over_the_fastest_baseline_of_any_dtype():
    records = two_prompts()
    for old in two_prompts():
        if old["mode"] == "baseline":
            other = {"mode": "baseline-bfloat16", "dtype": "bfloat16"}
            records.append(old | other | {"seconds": old["seconds"] / 2})
    figures = summarize(records)["greedy"]
    assert figures["staged"]["speedup"] == pytest.approx(4 / 3)
    assert figures["baseline"]["speedup"] == pytest.approx(0.5)
    assert figures["baseline-bfloat16"]["speedup"] == 1.0
    assert figures["baseline-bfloat16"]["exact_match"] is None, "another model, so to say"
    assert figures["staged"]["exact_match"] == [2, 2]


def test_the_interval_of_a_speed_up_holds_it_and_shrinks_with_prompts():
    random = np.random.default_rng(0)
    widths = []
    for count in (8, 200):
        records = []
        for prompt in range(count):
            records.append(record(prompt, "baseline", 2.0, [1], 1))
            records.append(record(prompt, "staged", float(random.uniform(0.5, 1.5)), [1], 1))
        figures = summarize(records)["greedy"]["staged"]
        low, high = figures["speedup_interval"]
        assert low < figures["speedup"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    singles = speedups(by_prompt(r for r in records if r["mode"] == "staged"),
                       by_prompt(r for r in records if r["mode"] == "baseline"))  # fmt: skip
    assert len(singles) == 200 and all(1 <= ratio <= 4 for ratio in singles.values())


def test_overhead_is_what_the_passes_alone_do_not_take():
    # Prefill of 9 tokens in chunks of 4: two passes of 0.1 s.
    records = [record(0, "staged", 2.0, [1, 2, 3], 3)]
    cost = {"seconds": 0.4, "prefill_width": 4, "prefill_seconds": 0.1}
    figures = summarize(records, {"staged": {"oracle": cost}})["greedy"]["staged"]
    assert figures["overhead_share"] == pytest.approx(1 - (3 * 0.4 + 2 * 0.1) / 2.0)
    assert summarize(records)["greedy"]["staged"]["overhead_share"] is None
    # Of 41 tokens, 32 in two wide passes, 9 in three.
    records[0]["prompt_tokens"] = 42
    cost |= {"wide_prefill_seconds": 0.15}
    figures = summarize(records, {"staged": {"oracle": cost}})["greedy"]["staged"]
    assert figures["overhead_share"] == pytest.approx(1 - (3 * 0.4 + 2 * 0.15 + 3 * 0.1) / 2.0)
    records[0]["prompt_tokens"] = 9
    # Two of the three rounds were narrower.
    records[0] |= {"round_passes": {"oracle": [1, 1, 1]}, "round_widths": [1, 4, 1]}
    cost |= {"width": 4, "narrower": {"1": 0.3}}
    figures = summarize(records, {"staged": {"oracle": cost}})["greedy"]["staged"]
    assert figures["overhead_share"] == pytest.approx(1 - (0.4 + 2 * 0.3 + 2 * 0.1) / 2.0)


def test_acceptance_by_depth_is_a_share_of_rounds():
    one = record(0, "staged", 1.0, [1] * 7, 3) | {"round_tokens": [4, 1, 2]}
    two = record(1, "staged", 1.0, [1], 1) | {"round_tokens": [1]}
    figures = summarize([one, two])["greedy"]["staged"]
    assert figures["acceptance_by_depth"] == [2 / 4, 1 / 4, 1 / 4]


def test_a_peer_that_tells_little_has_nulls_and_its_sampled_text_is_not_compared():
    silent = dict(passes={}, round_tokens=None, round_passes=None, origins=None, min_margin=None)
    peer = record(0, "hf", 2.0, [1, 2], 0) | silent | {"relative_bandwidth": None}
    records = [record(0, "baseline", 1.0, [1, 2], 2), peer]
    figures = summarize(records)["greedy"]["hf"]
    assert figures["speedup"] == 0.5 and figures["exact_match"] == [1, 1]
    for field in ("tokens_per_oracle_pass", "relative_bandwidth", "acceptance_by_depth"):
        assert figures[field] is None
    sampled = [one | {"sampling": "topk50"} for one in records]
    assert summarize(sampled)["topk50"]["hf"]["exact_match"] is None


def test_bandwidth_follows_from_passes_and_bytes():
    """An independent count: bytes of weights and cache, pass by pass."""
    stack = toys.stack()
    plans = {"staged": Plan.staged(1)}
    known = results.conditions(stack, plans, {})
    result = ssd_jax.generate(stack, [1, 2, 3], max_new_tokens=20)
    got = measure.timed(lambda: result, stack) | {"prompt_tokens": 3}
    read = plain = 0.0
    length = got["prompt_tokens"]
    for number, tokens in enumerate(got["round_tokens"]):
        for stage, counts in got["round_passes"].items():
            per_pass = known["weight_bytes"][stage] + known["cache_bytes_per_token"][stage] * length
            read += counts[number] * per_pass
        for position in range(length, length + tokens):
            plain += (
                known["weight_bytes"]["oracle"]
                + known["cache_bytes_per_token"]["oracle"] * position
            )
        length += tokens
    assert length == 3 + got["new_tokens"]
    assert got["relative_bandwidth"] == pytest.approx(read / plain)
    assert sum(got["round_passes"]["draft"]) == got["passes"]["draft"]


def test_a_run_that_compiled_is_repeated_and_the_whole_call_is_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    runs = [(60.0, make_result(seconds=50.0, compile_seconds=3.0)), (2.5, make_result(seconds=2.0))]

    def generate():
        seconds, result = runs.pop(0)
        now[0] += seconds
        return result

    got = measure.timed(generate, toys.stack())
    # Not the 2.0 s in the loop: peers are timed from call to return.
    assert (got["seconds"], got["compile_seconds"], got["origins"]) == (2.5, 3.0, "120")
    assert not runs


def test_modes_take_turns_within_every_repeat():
    calls = []

    def runner(mode):
        return lambda prompt, **options: calls.append((prompt, mode, options)) or {"seconds": 1.0}

    runners = {mode: runner(mode) for mode in MODES}
    options = dict(samplings=("greedy", "topk50"), repeats=2, seed=10)
    groups = list(measure.run(runners, ["a", "b"], **options, done=[(0, "topk50", 1)]))
    assert [[r["mode"] for r in group] for group in groups] == [list(MODES)] * 7
    assert [measure.combination(group[0]) for group in groups] == [
        (prompt, sampling, repeat)
        for prompt in (0, 1)
        for sampling in ("greedy", "topk50")
        for repeat in (0, 1)
        if (prompt, sampling, repeat) != (0, "topk50", 1)
    ]
    assert {call[2]["seed"] for call in calls if call[0] == "b"} == {11}
    assert {call[2].get("top_k") for call in calls} == {None, 50}


def test_published_figures_follow_from_the_committed_records():
    packed = (REPOSITORY / "docs" / "results" / "humaneval-cpu.json.gz").read_bytes()
    document = json.loads(gzip.decompress(packed))
    docs = (REPOSITORY / "docs" / "benchmarks.md").read_text("utf-8")
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    for modes in summarize(document["records"], document["costs"]).values():
        for mode, own in modes.items():
            start = f"| {mode} | {own['tokens_per_second']:.0f} | {own['speedup']:.2f}"
            assert start in docs
            if own["relative_bandwidth"] is not None:
                rest = f"{own['tokens_per_oracle_pass']:.2f} | "
                rest += f"{own['characters_per_oracle_pass']:.1f} | "
                rest += f"{own['relative_bandwidth']:.2f} | {100 * own['overhead_share']:.0f} %"
                assert rest in docs
        staged = modes["staged"]
        assert f"{staged['tokens_per_second']:.0f} ({staged['speedup']:.2f}x)" in readme
        assert f"**{staged['relative_bandwidth']:.2f}**" in readme


def test_the_shipped_prompts_are_beginnings_of_functions():
    prompts = load_prompts("heldout")
    assert len(prompts) == len(set(prompts)) >= 40
    for prompt in prompts:
        (function,) = ast.parse(prompt + "    pass\n").body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function)
    assert load_prompts("heldout", 3) == prompts[:3]


def test_humaneval_is_found_beside_the_user_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed: no network here
    with pytest.raises(DataError, match="HumanEval.jsonl.gz"):
        load_prompts("humaneval")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "HumanEval.jsonl").write_text('{"prompt": "x"}\n')
    assert load_prompts("humaneval") == ["x"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_prompts_are_read_up_to_the_limit(tmp_path, name):
    lines = "".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in ("a\n", "é", "c"))
    raw = lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read_prompts(tmp_path / name) == ["a\n", "é", "c"]
    assert read_prompts(tmp_path / name, limit=2) == ["a\n", "é"]


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
            read_prompts(path)


@pytest.mark.parametrize("cut", [1, 12, 25])
def test_damaged_gzip_is_refused(tmp_path, cut):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hello world"}\n')[:cut])
    with pytest.raises(DataError):
        read_prompts(path)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return path


def use_engine(monkeypatch, generate, checkpoint):
    stack = ssd_jax.load(TRIO.parent / "python-tiny")
    monkeypatch.setattr(ssd_jax, "load", lambda *_, **__: stack, raising=False)
    monkeypatch.setattr(ssd_jax, "generate", generate, raising=False)
    monkeypatch.setattr("ssd_jax.cli.shipped_checkpoint", lambda: checkpoint)


def test_command_writes_results_whose_summary_follows_from_its_records(
    monkeypatch, tmp_path, prompts_file, capsys
):
    use_engine(monkeypatch, lambda *_, **__: make_result(), tmp_path)
    out = tmp_path / "new" / "folder"
    argv = ["--prompts", str(prompts_file), "--out", str(out), "--sampling", "greedy,topk50"]
    assert command.main(argv) == 0
    document = results.read(out / "results.json")
    assert document["schema"] == results.SCHEMA
    assert len(document["records"]) == 2 * 2 * 4
    assert document["summary"] == summarize(document["records"], document["costs"])
    assert set(document["costs"]) == {*ALL_MODES, "baseline-bfloat16"}
    assert set(document["costs"]["staged"]["oracle"]["narrower"]) == {"1"}
    conditions = document["conditions"]
    assert conditions["prompts"] == "prompts.jsonl"
    assert (conditions["backend"], conditions["dtype"]) == ("cpu", "float32")
    assert set(conditions["plans"]) == set(ALL_MODES)
    assert str(tmp_path) not in json.dumps(document), "no path of this machine is recorded"
    printed = capsys.readouterr().out
    assert "2/2" in printed and "times draft's parameters" in printed and "8-gram" in printed


def count_calls(monkeypatch, tmp_path, stop_after=None):
    calls = []

    def generate(*_, **options):
        calls.append(options)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        return make_result()

    use_engine(monkeypatch, generate, tmp_path)
    monkeypatch.setattr(command, "EXAMPLES", 0)
    return calls


def test_passes_are_timed_between_the_texts(monkeypatch, tmp_path, prompts_file):
    events = count_calls(monkeypatch, tmp_path)
    turn = PassesAlone.turn
    monkeypatch.setattr(PassesAlone, "turn", lambda self: [turn(self), events.append("turn")])
    argv = ["--prompts", str(prompts_file), "--no-other-baseline", "--modes", "baseline"]
    assert command.main([*argv, "--repeats", "3"]) == 0
    order = ["turn" if event == "turn" else "text" for event in events]
    assert order[:8] == ["text"] * 4 + ["turn", "text", "turn", "text"]
    assert order[8:] == ["turn"] * 6, "eight turns at least"


def test_an_interrupted_run_is_continued_and_its_modes_still_take_turns(
    monkeypatch, tmp_path, prompts_file
):
    argv = ["--prompts", str(prompts_file), "--out", str(tmp_path), "--no-other-baseline"]
    count_calls(monkeypatch, tmp_path, stop_after=5)  # in the second prompt
    assert command.main(argv) == 130
    first = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [r["prompt"] for r in first] == [0, 0, 0]
    calls = count_calls(monkeypatch, tmp_path)
    assert command.main(argv) == 0
    assert len(calls) == 3
    document = results.read(tmp_path / "results.json")
    assert document["records"][:3] == first and len(document["records"]) == 6
    assert command.main(argv) == 0 and len(calls) == 3, "all is there"
    # A mode more: it must take turns with the others, so they are measured again with it.
    assert command.main([a for a in argv if a != "--no-other-baseline"]) == 0
    assert len(calls) == 3 + 2 * 4


def test_ablations_are_measured_once_and_kept(monkeypatch, tmp_path, prompts_file, capsys):
    count_calls(monkeypatch, tmp_path)
    asked = []

    def table(stack, prompts, **options):
        asked.append((list(prompts), options["max_new_tokens"]))
        return [{"variant": "tree", "tokens per oracle pass": 2.5, "speed": None}]

    monkeypatch.setattr(ablations, "ablate", table)
    monkeypatch.setattr(schemes, "compare", table)
    argv = ["--prompts", str(prompts_file), "--out", str(tmp_path), "--no-other-baseline"]
    assert command.main([*argv, "--ablations", "1"]) == 0
    assert asked == [(["a"], 128)] * 2
    assert "| tree | 2.50 | - |" in capsys.readouterr().out
    found = results.read(tmp_path / "results.json")["ablations"]
    assert set(found) == {"parts", "schemes of sampling"}
    assert command.main([*argv, "--ablations", "1"]) == 0 and len(asked) == 2
    assert results.read(tmp_path / "results.json")["ablations"] == found
    assert "tokens per oracle pass" in (tmp_path / "report.html").read_text("utf-8")


def test_a_peer_takes_turns_with_our_modes(monkeypatch, tmp_path, prompts_file):
    stack_calls = count_calls(monkeypatch, tmp_path)
    done = []

    def generate(tokens, **options):
        done.append((len(stack_calls), options))
        return peers.PeerRun([5, 6], 0.5, 2)

    def open_peer(name, oracle, draft, **options):
        assert (oracle.name, draft.name) == ("oracle", "draft") and options["calibration"]
        return SimpleNamespace(
            name=name, setting="eager, float32", skipped={}, dtype="float32", generate=generate
        )

    monkeypatch.setattr(peers, "open_peer", open_peer)
    argv = ["--prompts", str(prompts_file), "--out", str(tmp_path), "--no-other-baseline"]
    assert command.main([*argv, "--peers", "hf", "--sampling", "topk50"]) == 0
    assert [calls for calls, _ in done] == [3, 6]
    assert done[0][1] == {"max_new_tokens": 128, "temperature": 1.0, "top_k": 50, "seed": 0}
    document = results.read(tmp_path / "results.json")
    assert document["peers"]["hf"]["setting"] == "eager, float32"
    assert document["summary"]["topk50"]["hf"]["tokens_per_oracle_pass"] == 1.0


def test_results_of_other_conditions_are_not_continued(monkeypatch, tmp_path, prompts_file, capsys):
    count_calls(monkeypatch, tmp_path)
    argv = ["--prompts", str(prompts_file), "--out", str(tmp_path)]
    assert command.main(argv) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert command.main([*argv, "--max-new-tokens", "7"]) == 2
    assert "another max_new_tokens (128, not 7)" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema=2), f"schema {results.SCHEMA}"),
        (lambda d: d.pop("costs"), "no costs"),
        (lambda d: d["records"][0].pop("passes"), "record 0 has no proper 'passes'"),
        (lambda d: d["records"].append("x"), "record 1 has no proper"),
        (lambda d: d["records"][0].update(seconds="2"), "'seconds'"),
    ],
)
def test_damaged_results_are_refused(tmp_path, change, says):
    document = {"schema": results.SCHEMA, "conditions": {}, "costs": {}, "summary": {}}
    document["records"] = [record(0, "baseline", 1.0, [1], 1)]
    path = results.write(tmp_path, document)
    assert results.read(path) == document
    change(document)
    results.write(tmp_path, document)
    with pytest.raises(DataError, match=re.escape(says)):
        results.read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        results.read(path)


def test_a_failed_write_leaves_the_old_results(tmp_path):
    path = results.write(tmp_path, {"schema": results.SCHEMA})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        results.write(tmp_path, {"figure": float("nan")})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("plan", "drafts"),
    [
        (Plan.staged(1), [True, True, True, True]),
        (Plan.staged(1).paced(9.0, [9.0]), [True, False, False, False]),
    ],
    ids=["drafting", "resting"],
)
def test_the_trees_of_the_first_rounds_are_those_that_the_text_came_from(plan, drafts):
    stack = ssd_jax.load(TRIO.parent / "python-tiny")
    prompt = "def add(a, b):\n"
    expected = ssd_jax.generate(stack, prompt, plan=plan, max_new_tokens=60)
    trees = round_trees(stack, prompt, plan, rounds=4)
    assert len(trees) == 4
    assert [len(nodes) > 1 for nodes in trees] == drafts
    for nodes, committed in zip(trees, expected.stats.round_tokens, strict=False):
        assert nodes[0]["parent"] == -1 and nodes[0]["accepted"] and nodes[0]["evaluated"]
        assert sum(node["accepted"] for node in nodes) == committed, "the root stands for the last"
        for place, node in enumerate(nodes[1:], start=1):
            assert 0 <= node["parent"] < place
            above = nodes[node["parent"]]
            assert node["probability"] <= above["probability"] + 1e-6
            assert node["stage"] in ("draft", "ngram")
            assert not node["accepted"] or above["accepted"]
            assert not node["evaluated"] or above["evaluated"]
        text = "".join(node["token"] for node in nodes[1:] if node["accepted"])
        assert text in expected.text


def test_the_trees_of_a_hopeless_draft_have_none_of_its_nodes():
    stack = ssd_jax.load(TRIO.parent / "python-tiny")
    prompt = "def add(numbers):\n    total = 0\n    for number in numbers:\n"
    assert len(stack.tokenizer.encode(prompt)) > TRIAL
    hopeless = toys.stubborn(stack.drafts[0], stack.vocab_size - 1)
    stack = dataclasses.replace(stack, drafts=(hopeless,))
    plan = Plan.staged(1).paced(0.05, [0.1])
    expected = ssd_jax.generate(stack, prompt, plan=plan, max_new_tokens=30)
    assert sum(expected.stats.round_passes["draft"]) == 0
    trees = round_trees(stack, prompt, plan, max_new_tokens=30)
    assert len(trees) == expected.stats.rounds
    assert {node["stage"] for nodes in trees for node in nodes[1:]} == {"ngram"}


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
        command.main(["--prompts", "p.jsonl", *arguments.split()])
    assert exit.value.code == 2
    assert names in capsys.readouterr().err


def test_missing_prompts_file(capsys):
    assert command.main(["--prompts", "absent.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: absent.jsonl: ")
