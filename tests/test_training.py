"""The training pipeline: what is read, how it is split, and that a killed run loses nothing."""

import dataclasses
import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from email.message import Message
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax import stack
from ssd_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    VocabularyMismatchError,
)
from ssd_jax.gpt2 import GPT2
from ssd_jax.training import config as configs
from ssd_jax.training import corpus, loop, report, sample, tokens
from ssd_jax.training.config import END_OF_TEXT_ID, DataConfig, ModelConfig, TrainConfig
from ssd_jax.training.sources import permissive_licence
from ssd_jax.training.steps import Pipeline

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.toml"
SMALL = (
    "oracle.n_embd=16",
    "oracle.n_layer=1",
    "train_oracle.steps=30",
    "train_oracle.checkpoint_every=10",
    "train_oracle.evaluate_every=15",
    "train_oracle.long_context=64",
    "train_oracle.long_steps=6",
    "train_draft.steps=20",
    "train_draft.checkpoint_every=5",
    "train_draft.evaluate_every=20",
    "sample.batch=3",
    "sample.length=24",
    "tokenizer.vocab_size=280",
)
VERBS = ("add", "sub", "mul", "scale", "shift", "clamp", "merge", "split", "sort", "count")


def _write_code(folder: Path, packages: int = 12) -> Path:
    """A folder of small, alike, distinct modules: easy to learn, enough for both splits."""
    for package in range(packages):
        for verb in VERBS:
            lines = [f'"""{verb} of package {package}."""']
            for k in range(4):
                lines.append(f"def {verb}_{package}_{k}(self, value):\n    return value * {k}\n")
            path = folder / f"p{package}" / f"{verb}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(lines))
    return folder


def _config(folder: Path, *overrides: str) -> configs.Config:
    return configs.load(TINY, [f'data.folders=["{folder}"]', *SMALL, *overrides])


def _losses(work: Path, name: str) -> list[tuple]:
    rows = loop.read_log(work / name / "log.jsonl")
    return [(row["step"], row["loss"], row.get("heldout_cross_entropy")) for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One unbroken run of every step over a small folder."""
    folder = _write_code(tmp_path_factory.mktemp("code"))
    base = tmp_path_factory.mktemp("run")
    pipeline = Pipeline(_config(folder), base / "work", base / "trio", say=lambda line: None)
    for step in ("tokenizer", "oracle", "draft", "sample", "ngram", "report"):
        getattr(pipeline, step)()
    return pipeline


# --- Settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("oracle.n_embed=32", "unknown setting oracle.n_embed"),
        ("train_oracle.steps=many", "type int"),
        ("train_oracle.context=65", "longer than n_positions=64"),
        ("train_draft.long_context=65", "longer than n_positions=64"),
        ("sample.length=65", "longer than the draft's n_positions"),
        ("tokenizer.vocab_size=256", "vocab_size"),
        ("tokenizer.vocab_size=65537", "vocab_size"),
        ("train_draft.data_weight=1.5", "data_weight"),
        ("train_oracle.dtype=float16", "dtype"),
        ("sample.temperature=0.0", "temperature"),
        ("ngram.corpus=web", "corpus"),
        ("oracle.n_head=3", "not a multiple"),
        ("data.suffixes=3", "list of strings"),
        ("steps", "section.key=value"),
    ],
)
def test_a_bad_setting_is_named(override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        configs.load(TINY, [override])
    assert "\n" not in str(caught.value)


def test_every_shipped_config_is_valid_and_overridable():
    for path in (ROOT / "configs").glob("*.toml"):
        configs.load(path)
    changed = configs.load(TINY, ["train_oracle.learning_rate=1", "train_oracle.dtype=bfloat16"])
    assert changed.train_oracle.learning_rate == 1.0
    assert changed.train_oracle.dtype == "bfloat16"


def test_command_line_errors_are_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    argv = ["train.py", "oracle", "--config", str(TINY), "--workdir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("train.py: ") and message.count("\n") == 1


# --- Sources and documents ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "licence", "classifiers", "permissive"),
    [
        ("MIT", None, (), True),
        ("Apache-2.0 OR BSD-2-Clause", None, (), True),
        ("Apache-2.0 WITH LLVM-exception", None, (), True),
        ("MPL-2.0 AND MIT", None, (), False),
        ("GPL-3.0-only", "MIT", ("OSI Approved :: MIT License",), False),
        (None, "BSD 3-Clause License", (), True),
        (None, "3-Clause BSD License", (), True),
        (None, "Apache License, Version 2.0", (), True),
        (None, "Apache 2.0 License", (), True),
        (None, "ISC License", (), True),
        (None, "LGPL", ("OSI Approved :: MIT License",), False),
        (None, "", ("OSI Approved :: BSD License",), True),
        (None, "", ("OSI Approved", "OSI Approved :: MIT License"), True),
        (None, "", ("OSI Approved :: MIT License", "Other/Proprietary License"), False),
        (None, "", ("OSI Approved :: GNU General Public License v3 (GPLv3)",), False),
        (None, "", (), False),
        (None, "Copyright (c) 2001 A. Nyone. " + "All rights reserved. " * 9, (), False),
    ],
)
def test_only_known_permissive_licences_pass(expression, licence, classifiers, permissive):
    metadata = Message()
    for key, value in (("License-Expression", expression), ("License", licence)):
        if value is not None:
            metadata[key] = value
    for classifier in classifiers:
        metadata["Classifier"] = f"License :: {classifier}"
    assert (permissive_licence(metadata) is not None) == permissive


def test_a_package_without_permissive_licence_is_refused_by_name():
    with pytest.raises(DataError, match="not installed"):
        corpus.gather(DataConfig(packages=("no-such-package-here",)))
    with pytest.raises(DataError, match="permissive"):  # MPL-2.0
        corpus.gather(DataConfig(packages=("hypothesis",)))


def test_unusable_files_are_skipped_and_counted(tmp_path):
    _write_code(tmp_path)
    (tmp_path / "image.py").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "wide.py").write_text("x = [" + "1, " * 1000 + "]")
    (tmp_path / "made.py").write_text("# Generated by a tool. DO NOT EDIT.\nx = 1\n")
    (tmp_path / "marker.py").write_text("x = '<|endoftext|>'\n")
    (tmp_path / "copy.py").write_text((tmp_path / "p0" / "add.py").read_text())
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    text = corpus.gather(DataConfig(folders=(str(tmp_path),), heldout_one_in=5))
    assert text.skipped == {
        "not UTF-8 text": 1,
        "binary": 1,
        "empty": 1,
        "very long lines": 1,
        "generated": 1,
        "contains <|endoftext|>": 1,
        "duplicate": 1,
        "unreadable": 1,
    }
    assert len(text.train) + len(text.heldout) == 12 * len(VERBS)


def test_files_that_contain_a_benchmark_prompt_are_dropped(tmp_path):
    code = _write_code(tmp_path / "code")
    long_line = "Given a list of numbers return how many of them are frobnicated."
    (code / "p0" / "one.py").write_text("def  frobnicate(xs):\n    return 1\n")
    (code / "p0" / "two.py").write_text(f'"""\n      {long_line}\n"""\n')
    (code / "p0" / "three.py").write_text("def frobnicated(xs):\n    return 1\n")
    prompt = f'def frobnicate(xs):\n    """\n    {long_line}\n    """\n'
    benchmark = tmp_path / "problems.jsonl.gz"
    with gzip.open(benchmark, "wt") as file:
        file.write(json.dumps({"prompt": prompt, "entry_point": "frobnicate"}) + "\n")
    settings = DataConfig(folders=(str(code),), heldout_one_in=5, benchmark=str(benchmark))
    text = corpus.gather(settings)
    assert text.skipped["benchmark prompt"] == 2
    assert any(document.path == "p0/three.py" for document in text.train + text.heldout)
    assert corpus.card(text, settings)["benchmark_checked"]


def test_whole_modules_are_held_out_whatever_they_contain(tmp_path):
    settings = DataConfig(folders=(str(_write_code(tmp_path)),), heldout_one_in=5)
    before = corpus.gather(settings)
    modules = [{d.module for d in split} for split in (before.train, before.heldout)]
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    for path in tmp_path.rglob("*.py"):
        path.write_text(path.read_text() + "\nCHANGED = 1\n")
    after = corpus.gather(settings)
    assert {d.module for d in after.heldout} == modules[1]


def test_named_standard_library_modules_are_held_out_whole():
    settings = DataConfig(stdlib=True, heldout_modules=("json", "heapq"), heldout_one_in=10**9)
    text = corpus.gather(settings)
    assert {d.module for d in text.heldout} == {"json", "heapq"}
    assert {d.path for d in text.heldout} >= {"json/decoder.py", "json/__init__.py", "heapq.py"}
    paths = {d.path for d in text.train}
    assert "textwrap.py" in paths
    assert not any("site-packages" in path or "/test/" in path for path in paths)


def test_a_package_gives_no_more_than_its_share():
    settings = DataConfig(packages=("flax",), package_megabytes=0.3, heldout_one_in=2)
    text = corpus.gather(settings)
    assert 0.2e6 < sum(d.size for d in text.train + text.heldout) <= 0.3e6


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable text"):
        corpus.gather(DataConfig(folders=(str(tmp_path),)))
    with pytest.raises(DataError, match="does not exist"):
        corpus.gather(DataConfig(folders=(str(tmp_path / "typo"),)))


# --- Tokens ------------------------------------------------------------------------------


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_tokenizer_round_trips_any_text(run, text):
    tokenizer = tokens.Tokenizer.load(run.work)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    sizes = tokens.token_bytes(run.work / "tokenizer.json")
    assert sizes[ids].sum() == len(text.encode())


def test_tokenizer_has_the_vocabulary_asked_for(run):
    tokenizer = tokens.Tokenizer.load(run.work)
    assert tokenizer.vocab_size == 280
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_OF_TEXT_ID
    with pytest.raises(DataError, match="vocab_size"):
        tokens.train_tokenizer(["x"], configs.TokenizerConfig(vocab_size=1000))


def test_a_newline_and_its_indentation_are_one_piece():
    text = ["def f(x):\n        return x\n"] * 100
    tokenizer = tokens.train_tokenizer(text, configs.TokenizerConfig(vocab_size=272))
    assert len(tokenizer.encode("\n        ")) == 1


def test_token_file_holds_the_documents(run):
    text = corpus.gather(run.config.data)
    tokenizer = tokens.Tokenizer.load(run.work)
    for split in corpus.SPLITS:
        stored = [ids.tolist() for ids in tokens.TokenFile(run.work, split).texts()]
        documents = getattr(text, split)
        assert [ids[-1] for ids in stored] == [END_OF_TEXT_ID] * len(documents)
        for ids, document in zip(stored, documents, strict=True):
            assert tokenizer.decode(ids[:-1]) == document.text.rstrip("\n")


def test_documents_are_cut_after_newlines_as_prompts_are(run):
    tokenizer = tokens.Tokenizer.load(run.work)
    (newline,) = tokenizer.encode("\n")
    text = "def f():\n    return 1\n" * 400
    ids = tokens.encode_document(text, tokenizer, np.random.default_rng(0))
    assert tokenizer.decode(ids[:-1]) == text.rstrip("\n")
    # Uncut, a newline before an indented line is always joined with the indentation.
    whole = tokenizer.encode(text.rstrip("\n"))
    indented = "".join(tokenizer.decode([i]) for i in tokenizer.encode("\n    return"))
    assert indented.startswith("\n    ") and tokenizer.encode("\n    return")[0] != newline
    more = ids.count(newline) - whole.count(newline)
    assert 15 < more < 80  # one in ten of the 400 indented lines, or thereabouts


def _token_file(folder: Path, lengths: list[int], repeats: list[int]) -> tokens.TokenFile:
    starts = np.cumsum([0, *lengths])[:-1]
    np.save(folder / "train.tokens.npy", np.arange(sum(lengths), dtype=np.uint16))
    np.save(folder / "train.documents.npy", np.stack([starts, repeats], axis=1))
    return tokens.TokenFile(folder, "train")


def test_an_epoch_visits_every_window_as_often_as_its_document_repeats(tmp_path):
    file = _token_file(tmp_path, [32, 33], [3, 1])
    settings = TrainConfig(steps=99, batch=4, context=8, learning_rate=1.0)
    batches = tokens.Batches(file, settings, positions=8, seed=3)
    seen = np.concatenate([batches(step)[0][:, 0] for step in range(4)])
    expected = [0, 8, 16, 24] * 3 + [32, 40, 48, 56]
    assert sorted(seen) == sorted(expected)
    assert list(seen) != expected


def test_a_batch_depends_on_seed_and_step_only(tmp_path):
    file = _token_file(tmp_path, [400], [1])
    settings = TrainConfig(
        steps=20, batch=4, context=8, learning_rate=1.0, long_context=16, long_steps=5
    )
    one, other = (tokens.Batches(file, settings, positions=64, seed=0) for _ in range(2))
    inorder = [one(step) for step in range(20)]
    for step in reversed(range(20)):
        for a, b in zip(inorder[step], other(step), strict=True):
            np.testing.assert_array_equal(a, b)
    different = tokens.Batches(file, settings, positions=64, seed=1)(0)[0]
    assert not np.array_equal(different, inorder[0][0])
    assert [rows.shape for rows, _ in inorder] == [(4, 9)] * 15 + [(2, 17)] * 5
    for rows, positions in inorder:
        assert np.all(np.diff(rows) == 1) and np.all(np.diff(positions) == 1)
        assert positions.min() >= 0 and positions.max() < 64
    assert any(positions[:, 0].max() > 0 for _, positions in inorder)


def test_text_shorter_than_a_window_is_an_error(tmp_path):
    with pytest.raises(DataError, match="do not fill one window"):
        _token_file(tmp_path, [8], [1]).windows(8)
    with pytest.raises(DataError, match="tokenizer step"):
        tokens.TokenFile(tmp_path / "none", "train")


# --- Losses and optimiser ----------------------------------------------------------------


def test_losses_equal_their_definitions():
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 2, 3, 5)) * 3
    targets = random.integers(0, 5, (2, 3))
    probabilities = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q)]
    nats = [-np.log(probabilities[0][b, t, targets[b, t]]) for b in range(2) for t in range(3)]
    assert float(loop.cross_entropy(jnp.array(p), jnp.array(targets))) == pytest.approx(
        np.mean(nats), rel=1e-5
    )
    kl = (probabilities[0] * np.log(probabilities[0] / probabilities[1])).sum(-1).mean()
    assert float(loop.kl_divergence(jnp.array(p), jnp.array(q))) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_only(kind):
    params = {"kernel": jnp.ones((2, 2)), "table": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    settings = TrainConfig(
        steps=10, batch=1, context=1, learning_rate=0.1, warmup=1, weight_decay=0.3,
        optimizer=kind, adam_learning_rate=0.1,
    )  # fmt: skip
    optimizer = loop.optimizer(settings, params)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        grads = jax.tree.map(jnp.zeros_like, params)
        _, state = optimizer.update(grads, state, params)  # the warm-up starts at 0
        updates, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.3, rtol=1e-5)
    table = -0.1 * 0.3 if kind == "adamw" else 0.0
    np.testing.assert_allclose(updates["table"], table, rtol=1e-5)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_muon_orthogonalizes_kernels_and_nothing_else():
    params = {"kernel": jnp.zeros((4, 4)), "table": jnp.zeros((4, 4))}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    settings = TrainConfig(
        steps=10, batch=1, context=1, learning_rate=1.0, warmup=0, weight_decay=0.0,
        optimizer="muon", adam_learning_rate=1.0,
    )  # fmt: skip
    optimizer = loop.optimizer(settings, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    spread = {k: np.linalg.svd(u, compute_uv=False) for k, u in updates.items()}
    assert spread["kernel"].max() / spread["kernel"].min() < 2
    sizes = np.abs(updates["table"])  # Adam's first step goes by sign
    np.testing.assert_allclose(sizes, sizes[0, 0], rtol=1e-3)


def test_stages_must_share_a_vocabulary_and_fit_their_positions():
    shape = ModelConfig(n_embd=8, n_layer=1, n_head=1, n_positions=16)
    settings = TrainConfig(steps=1, batch=1, context=8, learning_rate=1.0)
    oracle = GPT2(shape.gpt2(300), rngs=nnx.Rngs(0))
    with pytest.raises(VocabularyMismatchError, match="300"):
        loop.Trainer(shape.gpt2(301), settings, teacher=oracle, seed=0)
    longer = dataclasses.replace(settings, context=17)
    with pytest.raises(ConfigError, match="n_positions=16"):
        loop.Trainer(shape.gpt2(300), longer, teacher=None, seed=0)


# --- The whole run -----------------------------------------------------------------------


def test_training_learns(run):
    uniform = np.log(280)
    for name, first in (("oracle", "cross_entropy"), ("draft", "kl")):
        log = loop.read_log(run.work / name / "log.jsonl")
        assert log[-1]["heldout_cross_entropy"] < 0.7 * uniform
        assert log[-1][first] < 0.8 * log[0][first]
        assert (run.work / name / "loss.png").read_bytes().startswith(b"\x89PNG")


def _copy_text(run: Pipeline, work: Path) -> Pipeline:
    """A fresh pipeline over the same encoded text."""
    work.mkdir()
    for path in run.work.glob("*.*"):
        (work / path.name).write_bytes(path.read_bytes())
    return Pipeline(run.config, work, work / "trio", say=lambda line: None)


def test_a_stopped_run_continues_like_an_unbroken_one(run, tmp_path):
    _copy_text(run, tmp_path / "work").oracle(stop_at=17)  # 7 steps past a checkpoint
    other = Pipeline(run.config, tmp_path / "work", tmp_path / "trio", say=lambda line: None)
    with open(other.work / "oracle" / "log.jsonl", "a") as file:
        file.write('{"step": 18, "lo')  # killed while writing
    other.oracle()
    assert _losses(other.work, "oracle") == _losses(run.work, "oracle")
    for a, b in zip(*(_weights(p, "oracle") for p in (run, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def _weights(pipeline: Pipeline, name: str) -> list:
    trainer = pipeline._trainer(name)
    return jax.tree.leaves(loop.restore(trainer, pipeline.work / name).params)


def test_a_finished_step_does_nothing_when_run_again(run):
    before = _losses(run.work, "oracle")
    lines = []
    again = Pipeline(run.config, run.work, run.out, say=lines.append)
    again.tokenizer()
    again.oracle()
    again.sample()
    assert _losses(run.work, "oracle") == before
    assert not any("tokens/s" in line or "B/token" in line for line in lines)


def test_a_lost_shard_is_drawn_again_as_it_was(run):
    path = run.work / "sample" / "00001.npy"
    before = path.read_bytes()
    path.unlink()
    run.sample()
    assert path.read_bytes() == before
    assert before != (run.work / "sample" / "00000.npy").read_bytes()


def test_samples_of_other_settings_are_replaced(run, tmp_path):
    work = tmp_path / "work"
    _copy_text(run, work)
    (work / "draft").symlink_to(run.work / "draft")
    settings = dataclasses.replace(run.config.sample, temperature=0.5, shards=1)
    cold = Pipeline(dataclasses.replace(run.config, sample=settings), work, work / "trio")
    (work / "sample").mkdir()
    (work / "sample" / "00000.npy").write_bytes(b"of another run")
    cold.sample()
    assert np.load(work / "sample" / "00000.npy").shape == (3, 24)


def test_another_shape_does_not_resume(run):
    shape = dataclasses.replace(run.config.oracle, n_embd=32)
    other = Pipeline(dataclasses.replace(run.config, oracle=shape), run.work, run.out)
    with pytest.raises(CheckpointError, match="does not fit"):
        other.oracle()


def test_other_text_does_not_mix_into_a_run(run):
    data = dataclasses.replace(run.config.data, heldout_one_in=7)
    with pytest.raises(ConfigError, match="workdir"):
        Pipeline(dataclasses.replace(run.config, data=data), run.work, run.out).tokenizer()


def test_steps_out_of_order_say_what_is_missing(run, tmp_path):
    fresh = _copy_text(run, tmp_path / "work")
    with pytest.raises(CheckpointError, match="train this model first"):
        fresh.draft()
    (fresh.work / "ngram.safetensors").unlink()
    with pytest.raises(DataError, match="sample step"):
        fresh.ngram()
    with pytest.raises(CheckpointError):
        fresh.report()


def test_the_trio_loads_and_its_card_says_what_it_is(run):
    trio = stack.load(run.out)
    assert trio.oracle.config == run.config.oracle.gpt2(280)
    assert len(trio.drafts) == 1 and trio.ngram is not None
    assert trio.tokenizer is not None and trio.eos_ids == (END_OF_TEXT_ID,)
    card = (run.out / "README.md").read_text()
    for words in ("bits per byte", "licence", "perplexity", "held out", "the user's own"):
        assert words in card


def test_report_equals_slow_references(run):
    trio = stack.load(run.out)
    file = tokens.TokenFile(run.work, "heldout")
    sizes = tokens.token_bytes(run.work / "tokenizer.json")
    models = (trio.oracle, trio.drafts[0])
    measured = report.compare(*models, file, sizes, context=32, windows=3, batch=2)
    nats, same, shared, size, count = [0.0, 0.0], 0, 0.0, 0, 0
    starts = file.windows(32)
    probabilities = jax.jit(lambda model, ids: jax.nn.softmax(model(ids)[0]))
    for start in starts[:: -(-len(starts) // 3)]:
        ids = np.asarray(file.tokens[start : start + 33], np.int32)
        p, q = (np.asarray(probabilities(model, ids[None, :-1])[0]) for model in models)
        for t in range(32):
            nats[0] -= np.log(p[t, ids[t + 1]])
            nats[1] -= np.log(q[t, ids[t + 1]])
            same += p[t].argmax() == q[t].argmax()
            shared += np.minimum(p[t], q[t]).sum()
            size += int(sizes[ids[t + 1]])
            count += 1
    assert measured.tokens == count
    assert measured.oracle_bits == pytest.approx(nats[0] / np.log(2) / size, rel=1e-4)
    assert measured.draft_bits == pytest.approx(nats[1] / np.log(2) / size, rel=1e-4)
    assert measured.agreement == pytest.approx(same / count)
    assert measured.overlap == pytest.approx(shared / count, rel=1e-4)


@pytest.mark.slow
def test_sigkill_loses_nothing(run, tmp_path):
    other = _copy_text(run, tmp_path / "work")
    folder = run.config.data.folders[0]
    overrides = [f'data.folders=["{folder}"]', *SMALL]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "oracle"]
    command += ["--config", str(TINY), "--workdir", str(other.work)]
    for override in overrides:
        command += ["--set", override]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = other.work / "oracle" / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(loop.read_log(log)) >= 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert _losses(other.work, "oracle") == _losses(run.work, "oracle")


# --- Sampling ----------------------------------------------------------------------------


def _toy(vocab: int) -> GPT2:
    shape = ModelConfig(n_embd=8, n_layer=2, n_head=2, n_positions=16).gpt2(vocab)
    shape = dataclasses.replace(shape, initializer_range=0.5)
    return GPT2(shape, rngs=nnx.Rngs(1))


def test_cold_sampling_equals_argmax_without_a_cache():
    model = _toy(11)
    drawn = sample.sample_tokens(model, jax.random.key(0), batch=2, length=9, temperature=1e-6)
    text = [END_OF_TEXT_ID]
    forward = jax.jit(lambda model, ids: model(ids)[0])
    for t in range(9):
        padded = np.zeros((1, 10), np.int32)  # what follows is hidden by the causal mask
        padded[0, : t + 1] = text
        text.append(int(forward(model, padded)[0, t].argmax()))
    assert len(set(text)) > 2
    assert drawn.tolist() == [text[1:]] * 2


def test_samples_follow_the_tempered_distribution():
    model, rows = _toy(5), 4000
    drawn = sample.sample_tokens(model, jax.random.key(2), batch=rows, length=2, temperature=1.5)
    contexts = jnp.array([[END_OF_TEXT_ID, token] for token in range(5)])
    logits, _ = jax.jit(lambda model, ids: model(ids))(model, contexts)
    probabilities = np.asarray(jax.nn.softmax(logits / 1.5))  # [first token, T, V]
    for token in range(5):
        here = np.asarray(drawn[:, 0] == token)
        first, expected = probabilities[token, 0, token], probabilities[token, 1]
        assert here.mean() == pytest.approx(first, abs=4 * np.sqrt(0.25 / rows))
        found = np.bincount(np.asarray(drawn)[here, 1], minlength=5) / max(here.sum(), 1)
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / max(here.sum(), 1))


def test_sampled_documents_end_where_the_text_does(tmp_path):
    rows = np.array([[3, 0, 4, 5], [0, 6, 7, 0]], np.uint16)
    tokens.save_array(tmp_path / "00000.npy", rows)
    documents = [piece.tolist() for piece in sample.sampled_documents(tmp_path, 1)]
    assert documents == [[3, 0], [4, 5], [0], [6, 7, 0]]
    with pytest.raises(DataError, match="sample step"):
        list(sample.sampled_documents(tmp_path, 2))
