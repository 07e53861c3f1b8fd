"""The command line against a scripted engine: what it prints, asks for, and refuses."""

import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

import ssd_jax
from ssd_jax import cli, decode_command, shipped
from ssd_jax.checkpoint import save_model
from ssd_jax.errors import CheckpointError, PromptError, VocabularyMismatchError
from ssd_jax.gpt2 import GPT2, GPT2Config
from ssd_jax.plan import MODES, DraftPlan, Plan

ROOT = Path(__file__).resolve().parent.parent
JSON_KEYS = {
    "text",
    "tokens",
    "origins",
    "mode",
    "new_tokens",
    "finish_reason",
    "stop_reason",
    "seconds",
    "compile_seconds",
    "from_cache",
    "tokens_per_second",
    "rounds",
    "tokens_per_oracle_pass",
    "passes",
    "relative_bandwidth",
}
PIECES = ("return ", "a + b\n", "\n")


def make_result(seconds=2.0, compile_seconds=0.0, tokens=(5, 6, 7)):
    return SimpleNamespace(
        text="".join(PIECES),
        tokens=list(tokens),
        origins=["draft", "ngram", "oracle"],
        finish_reason="eos",
        stop_reason=0,
        logprobs=None,
        top_logprobs=None,
        stats=SimpleNamespace(
            rounds=2,
            tokens_per_oracle_pass=1.5,
            passes={"oracle": 2, "draft": 3},
            round_tokens=[2, 1],
            round_passes={"oracle": [1, 1], "draft": [2, 1]},
            round_widths=[12, 1],
            relative_bandwidth=0.75,
            seconds=seconds,
            compile_seconds=compile_seconds,
            from_cache=False,
            new_tokens=len(tokens),
            tokens_per_second=len(tokens) / seconds,
            min_margin=0.25,
        ),
    )


class _Shape:
    """A model that is never run."""

    config = GPT2Config(n_layer=2)
    products = "tiled"


@dataclasses.dataclass
class FakeEngine:
    """Stands in for ``load`` and ``generate`` and keeps what it was called with."""

    loads: list = dataclasses.field(default_factory=list)
    calls: list = dataclasses.field(default_factory=list)
    seconds: dict = dataclasses.field(default_factory=dict)  # mode -> duration of each call
    tokens: dict = dataclasses.field(default_factory=dict)  # mode -> tokens, where different
    error: BaseException | None = None

    drafts: tuple = (_Shape,)
    oracle: type = _Shape
    ngram: None = None

    def load(self, path=None, **parts):
        self.loads.append((path, parts))
        return self

    def generate(self, stack, prompt, *, mode, on_text=None, **options):
        if self.error is not None:
            raise self.error
        assert stack is self
        earlier = sum(call["mode"] == mode for call in self.calls)
        self.calls.append({"prompt": prompt, "mode": mode, **options})
        for piece in PIECES if on_text else ():
            on_text(piece)
        seconds = self.seconds.get(mode, [2.0] * 9)[earlier]
        tokens = self.tokens.get(mode, (5, 6, 7))
        return make_result(seconds, compile_seconds=0.0 if earlier else 4.0, tokens=tokens)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()
    monkeypatch.setattr(ssd_jax, "load", fake.load, raising=False)
    monkeypatch.setattr(ssd_jax, "generate", fake.generate, raising=False)
    monkeypatch.setattr(cli, "shipped_checkpoint", lambda: tmp_path)
    return fake


def run(arguments: str) -> int:
    return decode_command.main(shlex.split(arguments))


def error_line(captured) -> str:
    """The one line on standard error; fails if there is more, or anything on standard output."""
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_json_is_one_object_with_the_documented_keys(engine, capsys):
    assert decode_command.main(["--json", "def add(a, b):"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == JSON_KEYS
    assert document["text"] == "return a + b\n\n"
    assert document["tokens"] == [5, 6, 7]
    assert document["origins"] == ["draft", "ngram", "oracle"]
    assert document["mode"] == "staged"
    assert document["new_tokens"] == 3
    assert document["finish_reason"] == "eos"
    assert document["seconds"] == 2.0
    assert document["compile_seconds"] == 4.0
    assert document["tokens_per_second"] == 1.5
    assert document["passes"] == {"oracle": 2, "draft": 3}
    assert (document["rounds"], document["tokens_per_oracle_pass"]) == (2, 1.5)
    assert document["relative_bandwidth"] == 0.75


def test_text_streams_after_the_prompt(engine, capsys):
    assert decode_command.main(["def add(a, b):\n    "]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def add(a, b):\n    return a + b\n\n\n"
    assert "3 tokens" in captured.err


def test_options_reach_the_engine(engine, tmp_path):
    plain = decode_command.main(["x"])
    full = run(
        "x --mode speculative --max-new-tokens 9 --temperature 0.8 --top-k 50 --top-p 0.95 --seed 7"
        " --checkpoint trio --dtype bfloat16 --exact --tokenizer t.json"
        " --stop A --stop B --max-time 1.5"
        " --min-p 0.1 --repetition-penalty 1.2 --min-new-tokens 3"
    )
    assert (plain, full) == (0, 0)
    names = ("min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    off = dict.fromkeys((*names, "min_new_tokens"))
    assert engine.calls == [
        dict(prompt="x", mode="staged", max_new_tokens=128, temperature=0.0)
        | dict(top_k=None, top_p=None, seed=0, plan=None)
        | dict(stop_strings=[], max_time=None, logprobs=None)
        | off,
        dict(prompt="x", mode="speculative", max_new_tokens=9, temperature=0.8)
        | dict(top_k=50, top_p=0.95, seed=7, plan=None)
        | dict(stop_strings=["A", "B"], max_time=1.5, logprobs=None)
        | off
        | dict(min_p=0.1, repetition_penalty=1.2, min_new_tokens=3),
    ]
    assert engine.loads == [
        (tmp_path, dict(tokenizer=None, dtype=None, exact=False)),
        ("trio", dict(tokenizer="t.json", dtype="bfloat16", exact=True)),
    ]


def test_several_samples(engine, capsys, monkeypatch):
    def generate(stack, prompt, *, num_return_sequences, seed, **_):
        return [make_result(tokens=(seed + i,)) for i in range(num_return_sequences)]

    monkeypatch.setattr(ssd_jax, "generate", generate)
    assert run("--n 3 --seed 7 x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        f"== seed {seed} (eos)" for seed in (7, 8, 9)
    ]
    assert lines[1] == "xreturn a + b"
    assert run("--n 3 --seed 7 --json x") == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["tokens"] for one in document["samples"]] == [[7], [8], [9]]
    assert all(set(one) == JSON_KEYS for one in document["samples"])


def test_log_probabilities_in_json(engine, capsys, monkeypatch):
    result = make_result()
    result.logprobs, result.top_logprobs = [-0.5, float("-inf"), 0.0], [{5: -0.5}, {6: -1.0}, {}]
    monkeypatch.setattr(ssd_jax, "generate", lambda *_, **options: result)
    assert run("--logprobs 1 --json x") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["logprobs"] == [-0.5, None, 0.0]
    assert document["top_logprobs"][:2] == [
        [{"token": 5, "logprob": -0.5}],
        [{"token": 6, "logprob": -1.0}],
    ]


def test_separate_parts_are_loaded_by_name(engine):
    run("x --oracle big --draft mid --draft small --ngram n.safetensors")
    (call,) = engine.loads
    parts = dict(oracle="big", drafts=["mid", "small"], ngram="n.safetensors")
    assert call == (None, parts | dict(tokenizer=None, dtype=None, exact=False))


def test_prompt_sources(engine, monkeypatch, tmp_path):
    file = tmp_path / "prompt.py"
    file.write_bytes("é = 1\r\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\r\n")))
    for argv in (["--prompt-file", str(file)], ["-"], ["--prompt-tokens", "1, 2,3"], [""]):
        assert decode_command.main(argv) == 0
    prompts = [call["prompt"] for call in engine.calls]
    assert prompts == ["é = 1\r\n", "from stdin\r\n", [1, 2, 3], ""]


@pytest.mark.parametrize("source", ["argument", "file", "stdin"])
def test_a_prompt_that_is_not_utf8_is_refused(engine, monkeypatch, tmp_path, capsys, source):
    file = tmp_path / "latin1"
    file.write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    argv = {"argument": ["caf\udce9"], "file": ["--prompt-file", str(file)], "stdin": ["-"]}
    assert decode_command.main(argv[source]) == 2
    assert "UTF-8" in error_line(capsys.readouterr())
    assert engine.loads == []


def test_compare_takes_the_median_and_the_modes_take_turns(engine, capsys):
    # The first of each list is the warm-up, which must not count.
    engine.seconds = {
        "baseline": [99.0, 6.0, 4.0, 60.0],
        "speculative": [99.0, 3.0, 3.0, 3.0],
        "staged": [99.0, 1.0, 2.0, 1.5],
    }
    assert decode_command.main(["--compare", "--json", "x"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert set(document) == JSON_KEYS | {"compare", "output_identical"}
    assert document["output_identical"] is True
    assert {mode: figures["seconds"] for mode, figures in document["compare"].items()} == {
        "baseline": 6.0,
        "speculative": 3.0,
        "staged": 1.5,
    }
    assert document["seconds"] == 1.5
    assert document["compare"]["baseline"]["compile_seconds"] == 4.0
    assert document["compare"]["baseline"]["tokens_per_second"] == 0.5
    assert "4.00x" in captured.err, "speed-up of staged: 6.0 s over 1.5 s"
    timed = [call["mode"] for call in engine.calls][3:]
    assert [set(timed[i : i + 3]) for i in (0, 3, 6)] == [set(MODES)] * 3


@pytest.mark.parametrize("deviant", MODES)
@pytest.mark.parametrize("tokens", [(5, 6, 8), (5, 6)])
def test_compare_notices_different_output(engine, capsys, deviant, tokens):
    engine.tokens = {deviant: tokens}
    assert decode_command.main(["--compare", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "output identical: no" in lines
    assert any("0.25" in line for line in lines), "the smallest margin is printed"


def test_compare_ends_with_its_verdict(engine, capsys):
    assert decode_command.main(["--compare", "x"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "output identical: yes"


def test_compare_leaves_out_speculative_where_there_is_no_draft(engine, capsys):
    engine.drafts = ()
    assert decode_command.main(["--compare", "--json", "x"]) == 0
    assert set(json.loads(capsys.readouterr().out)["compare"]) == {"baseline", "staged"}


def test_a_plan_goes_to_the_chosen_mode_only(engine, monkeypatch):
    monkeypatch.setattr(Plan, "load", lambda path: f"plan of {path}", raising=False)
    assert run("--compare --mode speculative --plan p.json x") == 0
    plans = {(call["mode"], call["plan"]) for call in engine.calls}
    assert plans == {("baseline", None), ("speculative", "plan of p.json"), ("staged", None)}


def test_numbers_that_json_lacks_become_null(engine, monkeypatch, capsys):
    result = make_result()
    result.stats.relative_bandwidth = float("nan")
    result.stats.tokens_per_second = float("inf")
    monkeypatch.setattr(ssd_jax, "generate", lambda *_, **__: result)
    assert decode_command.main(["--json", "x"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["relative_bandwidth"] is None
    assert document["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("", "PROMPT"),
        ("x --prompt-file f", "exactly one"),
        ("x --prompt-tokens 1", "exactly one"),
        ("--prompt-tokens 1,b", "integers"),
        ("x --temperature -0.5", "--temperature"),
        ("x --temperature nan", "--temperature"),
        ("x --temperature warm", "--temperature"),
        ("x --top-k -1", "--top-k"),
        ("x --top-p 0", "--top-p"),
        ("x --top-p 1.5", "--top-p"),
        ("x --top-p nan", "--top-p"),
        ("x --max-new-tokens 0", "--max-new-tokens"),
        ("x --seed -1", "--seed"),
        ("x --mode turbo", "--mode"),
        ("x --dtype float8", "--dtype"),
        ("x --checkpoint a --oracle b", "exclude"),
        ("x --draft a", "--oracle"),
        ("x --ngram a", "--oracle"),
        ("x --mode baseline --plan p.json", "--plan"),
        ("x --nonsense", "--nonsense"),
        ("x --stop ''", "--stop"),
        ("x --max-time 0", "--max-time"),
        ("x --max-time inf", "--max-time"),
        ("x --logprobs 3", "--json"),
        ("x --logprobs -1 --json", "--logprobs"),
        ("x --n 0", "--n"),
        ("x --n 2 --compare", "--n"),
        ("x --n 2 --svg f", "--n"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(engine, capsys, arguments, names):
    with pytest.raises(SystemExit) as exit:
        run(arguments)
    assert exit.value.code == 2
    assert names in error_line(capsys.readouterr())
    assert engine.loads == []


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("no config.json in x;\n give a folder"),
        VocabularyMismatchError("vocabularies differ"),
        PromptError("token 9 is out of range"),
        FileNotFoundError(2, "No such file or directory", "x/model.safetensors"),
        PermissionError("denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_one_line_and_status_2(engine, capsys, error):
    engine.error = error
    assert decode_command.main(["--json", "x"]) == 2
    words = " ".join(str(error.filename or error) if isinstance(error, OSError) else str(error))
    assert "".join(words.split()) in "".join(error_line(capsys.readouterr()).split())


def test_interrupt_is_status_130(engine, capsys):
    engine.error = KeyboardInterrupt()
    assert decode_command.main(["--json", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_disguised_as_a_user_error(engine):
    engine.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        decode_command.main(["x"])


def test_missing_prompt_file(engine, capsys, tmp_path):
    assert decode_command.main(["--prompt-file", str(tmp_path / "absent.py")]) == 2
    assert "absent.py" in error_line(capsys.readouterr())


def test_missing_shipped_checkpoint(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shipped, "_FOLDERS", (tmp_path,))
    assert decode_command.main(["x"]) == 2
    assert "--oracle" in error_line(capsys.readouterr())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with two random models and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(
        **dict(vocab_size=257, n_positions=32, n_embd=8, n_layer=1, n_head=2),
        **dict(bos_token_id=256, eos_token_id=None),
    )
    for index, name in enumerate(("oracle", "draft")):
        save_model(GPT2(config, rngs=nnx.Rngs(index)), folder / name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: token for token, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "oracle" / "tokenizer.json"))
    return folder


def test_real_models_agree_in_all_modes(tiny, tmp_path, capsys):
    small = Plan(width=4, drafts=(DraftPlan(rounds=1, width=2, branch=2),), depth=2, nodes=6)
    plan = tmp_path / "plan.json"
    plan.write_text(small.to_json())
    svg = tmp_path / "text.svg"
    argv = ["--oracle", tiny / "oracle", "--draft", tiny / "draft", "--plan", plan, "--svg", svg]
    assert (
        decode_command.main([*map(str, argv), "--compare", "--json", "--max-new-tokens", "8", "ab"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert svg.read_text().startswith("<svg")
    assert document["output_identical"] is True
    assert set(document["compare"]) == set(MODES)
    assert document["new_tokens"] == len(document["tokens"]) == len(document["origins"]) == 8
    assert document["passes"]["oracle"] == document["rounds"]
    assert document["compare"]["baseline"]["tokens_per_oracle_pass"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--prompt-tokens 257", "257"),
        ("--prompt-tokens " + ",".join("1" * 33), "33 tokens"),
        ("x --plan absent.json", "absent.json"),
        ("x --ngram absent.safetensors", "absent.safetensors"),
        ("x --draft ./absent", "absent"),
    ],
)
def test_real_engine_refuses_in_one_line(tiny, capsys, arguments, names):
    assert run(f"--oracle {tiny / 'oracle'} --mode speculative {arguments}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *estimate, error = captured.err.splitlines()
    assert error.startswith("error: ") and names in error
    assert all("of memory" in line for line in estimate)


def run_script(*argv: str) -> subprocess.CompletedProcess:
    """Run ``scripts/decode.py`` from elsewhere, as from a clone that is not installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "decode.py"), *argv]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60)


def test_verbose_shows_the_plan_and_where_the_time_went(engine, capsys):
    assert decode_command.main(["--verbose", "--json", "--plan", "default", "x"]) == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)) == JSON_KEYS
    head, *plan, line = captured.err.splitlines()
    assert head == "plan of mode staged, default:"
    assert Plan.from_json("\n".join(plan)) == Plan.staged(1, False).on_cpu([1.0], "tiled")
    words = ("first text after", "imports", "models", "program 4.00 (compiled)", "rest")
    assert all(word in line for word in words)


def test_help_needs_no_jax():
    code = """
import sys
from importlib import import_module
for name in ("decode_command", "benchmark.command", "training.command"):
    try:
        import_module(f"ssd_jax.{name}").main(["--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({"jax", "flax", "torch", "transformers", "tokenizers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_script_fails_in_one_line(tmp_path):
    done = run_script("--checkpoint", str(tmp_path / "absent"), "x")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "absent" in line
