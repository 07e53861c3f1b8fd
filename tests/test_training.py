"""The training pipeline: what is read, how it is split, and that a killed run loses nothing."""

import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from code_folder import VERBS, write_code
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from ssd_jax import checkpoint, stack
from ssd_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    VocabularyMismatchError,
)
from ssd_jax.generate import generate
from ssd_jax.gpt2 import GPT2, parameter_count
from ssd_jax.tokenizer import Tokenizer
from ssd_jax.training import command, corpus, loop, losses, progress, report, sample, tokens
from ssd_jax.training import config as configs
from ssd_jax.training.config import END_OF_TEXT_ID, ModelConfig, TrainConfig
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


def _config(folder: Path, *overrides: str) -> configs.Config:
    return configs.load(TINY, [f'data.folders=["{folder}"]', *SMALL, *overrides])


def _losses(work: Path, name: str) -> list[tuple]:
    rows = progress.read_log(work / name / "log.jsonl")
    return [(row["step"], row["loss"], row.get("heldout_cross_entropy")) for row in rows]


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """What one run compiles, other runs and the processes that they start read."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    saved = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in saved.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One unbroken run of every step over a small folder."""
    folder = write_code(tmp_path_factory.mktemp("code"))
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
        ("sample.temperature=0", "over and over"),
        ("sample.model=trigram", "draft or oracle"),
        ("train_oracle.generated=0.5", "oracle.init names"),
        ("train_draft.generated=0.5", "longer than the oracle"),
        ("tokenizer.vocab_size=256", "vocab_size"),
        ("tokenizer.vocab_size=65537", "vocab_size"),
        ("train_draft.data_weight=1.5", "data_weight"),
        ("train_draft.coupling=-0.5", "coupling"),
        ("sample.top_k=-1", "top_k"),
        ("train_oracle.dtype=float16", "dtype"),
        ("sample.temperature=-1.0", "temperature"),
        ('ngram.corpus=["web"]', "corpus"),
        ("ngram.corpus=[]", "corpus"),
        ("ngram.drawn_repeats=0", "drawn_repeats"),
        ("sample.greedy=2", "greedy"),
        ("sample.functions=true", "prompt"),
        ("oracle.n_head=3", "not a multiple"),
        ("data.suffixes=3", "list of strings"),
        ("steps", "section.key=value"),
        ("train_oracle.accumulate=3", "does not divide the batch of 8"),
        ("train_draft.evaluate_batches=0", "at least 1"),
        ("oracle.init=oracle", "cannot be the oracle itself"),
        ("oracle.init=some/folder", "gives the shape"),
        ("draft.init=oracle", "draft.n_embd must be the oracle's"),
        ("draft2.n_embd=8", "both sections"),
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
    seen = np.concatenate([batches(step).tokens[:, 0] for step in range(4)])
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
    assert [batch.tokens.shape for batch in inorder] == [(4, 9)] * 15 + [(2, 17)] * 5
    for rows, positions, loops in inorder:
        assert np.array_equal(loops, np.zeros_like(positions))
        assert np.all(np.diff(rows) == 1) and np.all(np.diff(positions) == 1)
        assert positions.min() >= 0 and positions.max() < 64
    assert any(batch.positions[:, 0].max() > 0 for batch in inorder)


def test_some_sequences_are_made_to_loop(tmp_path):
    file = _token_file(tmp_path, [4000], [1])
    settings = TrainConfig(steps=9, batch=16, context=48, learning_rate=1.0, loops=0.5)
    batches = tokens.Batches(file, settings, positions=64, seed=0)
    plain = tokens.Batches(file, dataclasses.replace(settings, loops=0.0), positions=64, seed=0)
    periods, shares = set(), []
    for step in range(9):
        batch, text = batches(step), plain(step)
        np.testing.assert_array_equal(batch.positions, text.positions)
        made = batch.loops.any(axis=1)
        shares.append(made.mean())
        np.testing.assert_array_equal(batch.tokens[~made], text.tokens[~made])
        for row, written, loops in zip(batch.tokens, text.tokens, batch.loops, strict=True):
            if not loops.any():
                continue
            first, period = int(np.flatnonzero(loops)[0]), int(loops[-1])
            assert np.array_equal(loops, np.where(np.arange(48) < first, 0, period))
            periods.add(period)
            # Two occurrences of the piece, the first as it was written, then the loop.
            start = first + 1 - 2 * period
            assert start >= 1 and 1 <= period <= 6
            np.testing.assert_array_equal(row[: start + period], written[: start + period])
            np.testing.assert_array_equal(row[start + period :], row[start:-period])
            assert row[start + period] != written[start + period]
    assert periods == {1, 2, 3, 4, 5, 6} and 0.3 < np.mean(shares) < 0.7


def test_a_loop_should_fade_by_half_each_turn():
    likelihood = np.array([[0.9, 0.8, 0.9, 0.7, 0.9, 0.4, 0.45, 0.1]], np.float32)
    loops = jnp.array([[0, 0, 0, 0, 2, 2, 2, 2]])
    loss = losses.loop_loss(-jnp.log(likelihood), loops)
    for t in range(4, 8):
        away = abs(likelihood[0, t] - likelihood[0, t - 2] / 2)
        assert float(loss[0, t]) == pytest.approx(-np.log(1 - away), rel=1e-4)
    gradient = jax.grad(lambda nats: losses.loop_loss(nats, loops)[0, 4])
    # Only the repeated token learns: making the first occurrence likelier is no way out.
    assert np.flatnonzero(gradient(-jnp.log(likelihood))).tolist() == [4]
    assert np.isfinite(losses.loop_loss(jnp.zeros((1, 4)), jnp.ones((1, 4), jnp.int32))).all()


def test_a_model_learns_to_leave_loops(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "train.tokens.npy", random.integers(0, 40, 6000).astype(np.uint16))
    np.save(tmp_path / "train.documents.npy", np.array([[0, 1]]))
    file = tokens.TokenFile(tmp_path, "train")
    shape = ModelConfig(n_embd=32, n_layer=2, n_head=2, n_positions=64).gpt2(40, END_OF_TEXT_ID)
    turns = {}
    for share in (0.0, 0.5):
        settings = TrainConfig(
            steps=120, batch=16, context=48, learning_rate=5e-3, warmup=10, dtype="float32",
            loops=share,
        )  # fmt: skip
        trainer = loop.Trainer(shape, settings, teacher=None, seed=0)
        state = trainer.initial()
        # Everything loops here; without the loss it is text like any other.
        always = dataclasses.replace(settings, loops=1.0)
        batches = tokens.Batches(file, always, positions=64, seed=0)
        for step in range(120):
            batch = batches(step)
            if not share:
                batch = tokens.Batch.plain(batch.tokens, batch.positions)
            state, _ = trainer.step(state, batch)
        nats = _nats(trainer.model(state), batch)
        late = np.arange(48) >= np.argmax(batches(step).loops > 0, axis=1)[:, None] + 8
        is_loop = late & (batches(step).loops > 0)
        turns[share] = float(np.exp(-nats)[is_loop].mean())
    assert turns[0.5] < 0.5 * turns[0.0]


def test_loops_of_drawn_text_are_found():
    text = [1, 2, *range(10, 18), 3, *range(10, 18), 4, *range(10, 18), 5, *range(11, 19), 6]
    found = tokens.Generated.to_unlearn([np.array(text[:2])], [np.array(text[2:])], len(text), 0)
    np.testing.assert_array_equal(found.tokens, [text])
    # The third occurrence of eight tokens is a loop, nine back; what was drawn is never learnt.
    expected = [0] + [tokens.IGNORED] * (len(text) - 2)
    expected[text.index(5) - 2] = 9
    assert found.loops[0].tolist() == expected
    loops = tokens.Generated.to_unlearn([np.full(20, 7)], [np.array([], int)], 20, 0).loops
    assert loops.tolist() == [[0] * 19]  # a prompt is text like any other
    for end, mark in ((0, 0), (9, tokens.IGNORED)):  # without a loop and ended, or cut off
        loops = tokens.Generated.to_unlearn([np.array([1])], [np.array([5, 6, end])], 4, 0).loops
        assert loops.tolist() == [[mark] * 3]


def test_drawn_texts_to_imitate_follow_one_another():
    prompts = [np.array([1, 2]), np.array([3])]
    drawn = [np.array([4, 0]), np.array([5, 6, 7, 8, 9, 9, 9])]
    found = tokens.Generated.to_imitate(prompts, drawn, 7)
    np.testing.assert_array_equal(found.tokens, [[1, 2, 4, 0, 3, 5, 6], [3, 5, 6, 7, 8, 9, 9]])
    unlearnt = tokens.IGNORED  # the first token of the second text
    np.testing.assert_array_equal(found.loops, [[0, 0, 0, unlearnt, 0, 0], [0] * 6])


def test_generated_rows_are_marked_and_start_at_position_0(tmp_path):
    file = _token_file(tmp_path, [4000], [1])
    texts = list(np.full((3, 30), 5000, np.uint16))
    drawn = tokens.Generated.to_unlearn([t[:4] for t in texts], [t[4:] for t in texts], 30, 0)
    settings = TrainConfig(steps=9, batch=16, context=24, learning_rate=1.0, generated=0.5)
    shares = []
    for step in range(9):
        batch = tokens.Batches(file, settings, 64, 0, drawn)(step)
        rows = batch.tokens[:, 0] == 5000
        shares.append(rows.mean())
        assert (batch.tokens[rows] == 5000).all() and (batch.positions[rows, 0] == 0).all()
        assert all(np.array_equal(row, drawn.loops[0, :24]) for row in batch.loops[rows])
        assert not batch.loops[~rows].any()
    assert 0.3 < np.mean(shares) < 0.7


def test_what_is_ignored_teaches_nothing():
    trainer, batch = _trainer()
    model = trainer.model(trainer.initial())
    loops = np.tile(np.where(np.arange(12) < 6, 0, tokens.IGNORED), (8, 1)).astype(np.int32)
    _, metrics = trainer.step(trainer.initial(), batch._replace(loops=loops))
    learnt = _nats(model, batch)[:, :6].mean()
    assert float(metrics["cross_entropy"]) == pytest.approx(learnt, rel=1e-5)


def _nats(model: GPT2, batch: tokens.Batch) -> np.ndarray:
    logits, _ = model(jnp.asarray(batch.tokens[:, :-1]), jnp.asarray(batch.positions))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], axis=-1)
    return -np.asarray(picked[..., 0])


def test_text_shorter_than_a_window_is_an_error(tmp_path):
    with pytest.raises(DataError, match="do not fill one window"):
        _token_file(tmp_path, [8], [1]).windows(8)
    with pytest.raises(DataError, match="tokenizer step"):
        tokens.TokenFile(tmp_path / "none", "train")


# --- Losses and optimiser ----------------------------------------------------------------


def test_divergence_equals_its_definition():
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 2, 3, 5)) * 3
    probabilities = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q)]
    kl = (probabilities[0] * np.log(probabilities[0] / probabilities[1])).sum(-1).mean()
    assert float(losses.kl_divergence(jnp.array(p), jnp.array(q))) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("drawn_from", [3, 9])
def test_the_same_draw_is_as_likely_as_draws_say(monkeypatch, drawn_from):
    monkeypatch.setattr(losses, "DRAWN_FROM", drawn_from)
    random, draws = np.random.default_rng(0), 20_000
    p, q = random.normal(size=(2, 1, 4, 6)).astype(np.float32) * 2
    q[0, 0] = p[0, 0]
    q[0, 1, p[0, 1].argmax()] = -1000.0  # what the oracle most likely draws is ruled out
    p_cut = np.where(p >= np.sort(p)[..., [-min(drawn_from, 6)]], p, -np.inf)
    noise = random.gumbel(size=(draws, 1, 1, 6))
    same = ((p_cut + noise).argmax(-1) == (q + noise).argmax(-1)).mean()
    found, gradient = jax.value_and_grad(losses.same_draw, argnums=1)(jnp.array(p), jnp.array(q))
    assert float(found) == pytest.approx(same, abs=4 * np.sqrt(0.25 / draws / 4))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    assert float(losses.same_draw(jnp.array(p), jnp.array(p_cut))) == pytest.approx(1)


def test_a_student_that_is_too_small_draws_the_same_more_often_than_by_divergence():
    """One distribution for three, two of them alike: the mean by divergence, best to follow two."""
    wanted = 6 * jax.nn.one_hot(jnp.array([[2, 2, 4]]), 5)
    student = jnp.log(jax.nn.softmax(wanted).mean(1, keepdims=True))

    @jax.jit
    def ascend(student):
        return student + jax.grad(lambda s: losses.same_draw(wanted, s + 0 * wanted))(student)

    by_divergence = float(losses.same_draw(wanted, student + 0 * wanted))
    for _ in range(100):
        student = ascend(student)
    assert float(losses.same_draw(wanted, student + 0 * wanted)) > by_divergence + 0.05


def test_a_coupled_loss_is_made_of_what_its_parts_say():
    teacher = _toy(40)
    trainer, batch = _trainer(teacher, data_weight=0.2, coupling=0.25)
    p, q = (m(batch.tokens[:, :-1])[0] for m in (teacher, trainer.model(trainer.initial())))
    nats = _nats(trainer.model(trainer.initial()), batch).mean()
    kl, same = float(losses.kl_divergence(p, q)), float(losses.same_draw(p, q))
    _, metrics = trainer.step(trainer.initial(), batch)
    expected = 0.2 * nats + 0.8 * (0.75 * kl + 0.25 * (1 - same))
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


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
    oracle = GPT2(shape.gpt2(300, 0), rngs=nnx.Rngs(0))
    with pytest.raises(VocabularyMismatchError, match="300"):
        loop.Trainer(shape.gpt2(301, 0), settings, teacher=oracle, seed=0)
    longer = dataclasses.replace(settings, context=17)
    with pytest.raises(ConfigError, match="n_positions=16"):
        loop.Trainer(shape.gpt2(300, 0), longer, teacher=None, seed=0)


# --- The whole run -----------------------------------------------------------------------


def test_training_learns(run):
    uniform = np.log(280)
    for name, first in (("oracle", "cross_entropy"), ("draft", "kl")):
        log = progress.read_log(run.work / name / "log.jsonl")
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
    path = run.work / "sample" / "00001.npz"
    before = path.read_bytes()
    path.unlink()
    run.sample()
    assert path.read_bytes() == before
    assert before != (run.work / "sample" / "00000.npz").read_bytes()


def test_samples_of_other_settings_are_replaced(run, tmp_path):
    work = tmp_path / "work"
    _copy_text(run, work)
    (work / "draft").symlink_to(run.work / "draft")
    settings = dataclasses.replace(run.config.sample, temperature=0.5, shards=1)
    cold = Pipeline(dataclasses.replace(run.config, sample=settings), work, work / "trio")
    (work / "sample").mkdir()
    (work / "sample" / "00000.npz").write_bytes(b"of another run")
    cold.sample()
    (shard,) = sample.read_shards(work / "sample", settings)
    assert shard.drawn.shape == (3, 24) and shard.drawn.dtype == np.uint16


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
    with pytest.raises(DataError, match="step that draws it"):
        fresh.ngram()
    with pytest.raises(CheckpointError):
        fresh.report()


def test_the_trio_loads_and_its_card_says_what_it_is(run):
    trio = stack.load(run.out)
    assert trio.oracle.config == run.config.oracle.gpt2(280, END_OF_TEXT_ID)
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
    named = {"oracle": trio.oracle, "draft": trio.drafts[0]}
    measured = report.compare(named, file, sizes, context=32, windows=3, batch=2)
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
    for quality, total in zip(measured.values(), nats, strict=True):
        assert quality.tokens == count
        assert quality.bits == pytest.approx(total / np.log(2) / size, rel=1e-4)
    assert measured["oracle"].agreement == 1
    assert measured["oracle"].overlap == pytest.approx(1, rel=1e-4)
    assert measured["draft"].agreement == pytest.approx(same / count)
    assert measured["draft"].overlap == pytest.approx(shared / count, rel=1e-4)


KILLED = """
import os, signal, sys
from ssd_jax.training import command, progress

def die():
    os.kill(os.getpid(), int(kind))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
kind, where, *argv = sys.argv[1:]
replace, add = os.replace, progress.Log.add

def replace_or_die(source, target, **kinds):
    if str(target).endswith(where):
        with open(source, "r+b") as file:  # what a crash leaves: half a file, under another name
            file.truncate(os.path.getsize(source) // 2)
        die()
    replace(source, target, **kinds)

def add_or_die(self, step, metrics, evaluated):
    add(self, step, metrics, evaluated)
    if f"{self._path.parent.name} step {step}" == where:
        die()

os.replace, progress.Log.add = replace_or_die, add_or_die
sys.exit(command.main(argv))
"""


KILL = str(int(signal.SIGKILL))


def _command(run: Pipeline, step: str, work: Path, *more: str) -> list[str]:
    argv = [step, "--config", str(TINY), "--workdir", str(work), "--out", str(work / "trio")]
    for override in (f'data.folders=["{run.config.data.folders[0]}"]', *SMALL, *more):
        argv += ["--set", override]
    return argv


def _subprocess(program: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_sigkill_in_the_middle_of_any_step_loses_nothing(run, tmp_path):
    work = tmp_path / "work"
    for where in (
        "heldout.tokens.npy",
        "oracle step 17",
        "draft step 12",
        "00001.npz",
        "/ngram.safetensors",
        "/draft/config.json",
    ):
        done = _subprocess(KILLED, KILL, where, *_command(run, "all", work))
        assert done.returncode == -signal.SIGKILL, (where, done.stderr)
    again = _subprocess(KILLED, KILL, "nowhere", *_command(run, "all", work))
    assert again.returncode == 0, again.stderr
    for name in run.config.models:
        assert _losses(work, name) == _losses(run.work, name)
    made = {path.relative_to(run.out): path for path in run.out.rglob("*") if path.is_file()}
    assert len(made) >= 10
    for name, path in made.items():
        if path.suffix == ".safetensors":  # its header lists metadata in no fixed order
            one, other = load_file(path), load_file(work / "trio" / name)
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert np.array_equal(tensor, other[key]), (name, key)
        else:
            assert (work / "trio" / name).read_bytes() == path.read_bytes(), name


def test_signals_end_training_in_a_line_and_it_goes_on(run, tmp_path):
    argv = _command(run, "all", tmp_path / "work")
    done = _subprocess(KILLED, str(int(signal.SIGINT)), "oracle step 17", *argv)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].endswith("run the same command again to resume")
    assert "Traceback" not in done.stderr
    done = _subprocess(KILLED, str(int(signal.SIGTERM)), "draft step 12", *argv)
    assert done.returncode == -signal.SIGTERM, done.stderr
    done = _subprocess(KILLED, KILL, "nowhere", *argv)
    assert done.returncode == 0, done.stderr
    for name in run.config.models:
        assert _losses(tmp_path / "work", name) == _losses(run.work, name)


FULL_DISK = """
import resource, signal, sys
from ssd_jax.training import command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(command.main(sys.argv[2:]))
"""


def test_a_full_disk_is_said_and_costs_nothing(run, tmp_path):
    # Wide, so that checkpoints are by far the largest files that are written.
    config = dataclasses.replace(
        run.config, oracle=dataclasses.replace(run.config.oracle, n_embd=128)
    )
    whole, other = (_copy_text(run, tmp_path / name) for name in ("whole", "work"))
    whole.config = other.config = config
    whole.oracle()
    other.oracle(stop_at=12)
    # JAX would leave half a program in its cache, too.
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = _command(run, "oracle", other.work, "oracle.n_embd=128")
    full = _subprocess(FULL_DISK, str(200_000), *command, **environment)
    assert full.returncode == 2, full.stderr
    messages = [line for line in full.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(messages) == 1, full.stderr
    message = messages[0]
    assert "step 20" in message and "step 10 is intact" in message and "free disk" in message
    other.oracle()
    assert _losses(other.work, "oracle") == _losses(whole.work, "oracle")


def test_a_diverging_run_stops_and_keeps_its_last_good_state(run, tmp_path):
    other = _copy_text(run, tmp_path / "work")
    other.oracle(stop_at=12)
    hot = dataclasses.replace(run.config.train_oracle, learning_rate=1e30)
    again = dataclasses.replace(run.config, train_oracle=hot)
    with pytest.raises(ConfigError, match=r"loss is .* step 10 is intact"):
        Pipeline(again, other.work, other.out, say=lambda line: None).oracle()
    other.oracle()
    assert _losses(other.work, "oracle") == _losses(run.work, "oracle")


def test_work_is_summed_up_before_it_starts(run, tmp_path):
    lines: list[str] = []
    other = _copy_text(run, tmp_path / "work")
    other.say = lines.append
    other.oracle(stop_at=12)
    parameters = parameter_count(stack.load(run.out).oracle)
    assert f"oracle: {parameters:,} parameters, 30 steps of 256 tokens" in lines[0]
    assert "epochs" in lines[0]
    assert re.search(r"on 1 device: about \S+ s a step, \d.* in all; \S+ GB of memory", lines[1])
    other.oracle(stop_at=12)
    assert any("10 steps are done" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.2, "4 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_read_well(seconds, said):
    assert progress.duration(seconds) == said


def test_models_start_from_a_folder_or_from_the_oracle(run, tmp_path):
    folder = run.out / "oracle"
    work = tmp_path / "work"
    base = [
        f'data.folders=["{run.config.data.folders[0]}"]',
        f'tokenizer.init="{folder}"',
        f'oracle.init="{folder}"',
        "oracle.n_embd=0", "oracle.n_layer=0", "oracle.n_head=0",
        'draft.init="oracle"', "draft.n_embd=16",
        "draft2.n_embd=8", "draft2.n_layer=1", "draft2.n_head=1", "draft2.n_positions=64",
        "train_draft2.steps=5", "train_draft2.batch=4", "train_draft2.context=16",
        "train_draft2.learning_rate=0.01", "train_draft2.data_weight=0.5",
        "train_oracle.steps=3", "train_oracle.learning_rate=1e-6", "train_draft.steps=4",
        "train_oracle.generated=0.5", "own.model=oracle", "own.temperature=0", "own.prompt=9",
        "own.length=30", "own.shards=1", "own.batch=3", "train_draft.generated=0.5",
        "generated.model=oracle", "generated.prompt=9", "generated.length=30",
        "generated.shards=2", "generated.batch=3",
        "sample.length=24",
    ]  # fmt: skip
    tuned = Pipeline(configs.load(TINY, base), work, work / "trio", say=lambda line: None)
    for step in command.STEPS:
        getattr(tuned, step)()
    assert tuned.config.models == ("oracle", "draft", "draft2")
    assert [len(list((work / name).glob("*.npz"))) for name in ("own", "generated")] == [1, 2]
    # It begins where the other ended: at the first step it is as good as that one after 30.
    before, after = (progress.read_log(p.work / "oracle" / "log.jsonl") for p in (run, tuned))
    assert after[0]["cross_entropy"] < before[0]["cross_entropy"] - 1
    shipped = json.loads((folder / "tokenizer.json").read_text())
    assert json.loads((work / "tokenizer.json").read_text()) == shipped
    trio = stack.load(work / "trio")
    assert [draft.config.n_embd for draft in trio.drafts] == [16, 8]
    close = [
        np.allclose(a, b, atol=1e-2)
        for a, b in zip(*(_leaves(s.oracle) for s in (trio, stack.load(run.out))), strict=True)
    ]
    assert all(close)
    runs = json.loads((work / "trio" / "oracle" / "training.json").read_text())["runs"]
    assert [(entry["init"], entry["steps"]) for entry in runs] == [
        ("random weights", 30),
        (str(folder), 3),
    ]
    card = (work / "trio" / "README.md").read_text()
    assert "draft2" in card and f"| oracle | 2 | {folder} | 3 |" in card


def _leaves(model: GPT2) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_a_start_of_another_vocabulary_is_refused(run, tmp_path):
    other = _copy_text(run, tmp_path / "work")
    checkpoint.save_model(toys.model(), tmp_path / "toy")
    shape = ModelConfig(init=str(tmp_path / "toy"))
    with pytest.raises(VocabularyMismatchError, match=r"53 tokens.*280"):
        Pipeline(dataclasses.replace(run.config, oracle=shape), other.work, run.out).oracle()


def test_the_trio_decodes_alike_and_accepts_more_than_an_untrained_one(run, tmp_path):
    """`train.py all` with the tiny config, trained until it knows its text."""
    code = f'data.folders=["{run.config.data.folders[0]}"]'
    argv = [
        "all",
        "--config",
        str(TINY),
        "--workdir",
        str(tmp_path),
        "--out",
        str(tmp_path / "trio"),
    ]
    for override in (code, "train_oracle.steps=250", "train_draft.steps=250"):
        argv += ["--set", override]
    assert command.main(argv) == 0
    trio = stack.load(tmp_path / "trio")
    stranger = GPT2(trio.drafts[0].config, rngs=nnx.Rngs(7))
    prompts = [f"def {verb}_" for verb in VERBS[:4]]
    passes = {"trained": 0, "untrained": 0}
    for name, draft in (("trained", trio.drafts[0]), ("untrained", stranger)):
        pair = dataclasses.replace(trio, drafts=(draft,), ngram=None)
        for prompt in prompts:
            plain = generate(pair, prompt, max_new_tokens=24, mode="baseline")
            drafted = generate(pair, prompt, max_new_tokens=24, mode="speculative")
            assert drafted.tokens == plain.tokens
            passes[name] += drafted.stats.passes["oracle"]
    # Without any accepted guess it would be 96.
    assert passes["trained"] < 40 and passes["trained"] < 0.8 * passes["untrained"], passes


# --- Parts of a batch, and devices -------------------------------------------------------


def _trainer(teacher: GPT2 | None = None, **changes) -> tuple[loop.Trainer, tokens.Batch]:
    shape = ModelConfig(n_embd=8, n_layer=2, n_head=2, n_positions=16).gpt2(40, END_OF_TEXT_ID)
    settings = TrainConfig(
        steps=4, batch=8, context=12, learning_rate=0.1, warmup=0, dtype="float32"
    )
    settings = dataclasses.replace(settings, **changes)
    trainer = loop.Trainer(shape, settings, teacher=teacher, seed=0)
    random = np.random.default_rng(0)
    rows = random.integers(0, 40, (8, 13)).astype(np.int32)
    return trainer, tokens.Batch.plain(rows, np.tile(np.arange(12), (8, 1)))


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_taken_in_parts_gives_the_step_of_the_whole(parts):
    (whole, batch), (split, _) = _trainer(), _trainer(accumulate=parts)
    plain = float(_nats(whole.model(whole.initial()), batch).mean())
    a, one = whole.step(whole.initial(), batch)
    assert float(one["cross_entropy"]) == pytest.approx(plain, rel=1e-5)
    b, other = split.step(split.initial(), batch)
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
    for x, y in zip(jax.tree.leaves(a.moments), jax.tree.leaves(b.moments), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_several_devices_share_a_batch_and_change_nothing(run, tmp_path):
    other = _copy_text(run, tmp_path / "work")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    more = ("train_oracle.steps=8", "train_oracle.long_steps=2")
    done = _subprocess(
        "import sys; from ssd_jax.training import command; sys.exit(command.main(sys.argv[1:]))",
        *_command(run, "oracle", other.work, *more),
        XLA_FLAGS=flags,
    )
    assert done.returncode == 0, done.stderr
    assert "on 4 devices" in done.stdout
    alone = _copy_text(run, tmp_path / "alone")
    settings = dataclasses.replace(run.config.train_oracle, steps=8, long_steps=2)
    alone.config = dataclasses.replace(run.config, train_oracle=settings)
    alone.oracle()
    together = [row[1] for row in _losses(other.work, "oracle")]
    assert together == pytest.approx([row[1] for row in _losses(alone.work, "oracle")], rel=1e-4)


# --- Sampling ----------------------------------------------------------------------------


def _toy(vocab: int) -> GPT2:
    shape = ModelConfig(n_embd=8, n_layer=2, n_head=2, n_positions=16).gpt2(vocab, END_OF_TEXT_ID)
    shape = dataclasses.replace(shape, initializer_range=0.5)
    return GPT2(shape, rngs=nnx.Rngs(1))


def test_cold_sampling_equals_argmax_without_a_cache():
    model = _toy(11)
    prompts = np.full((2, 1), END_OF_TEXT_ID)
    drawn, likeliest = (
        sample.sample_tokens(model, jax.random.key(0), prompts, np.ones(2), length=9, temperature=t)
        for t in (1e-6, 0)
    )
    text = [END_OF_TEXT_ID]
    forward = jax.jit(lambda model, ids: model(ids)[0])
    for t in range(9):
        padded = np.zeros((1, 10), np.int32)  # what follows is hidden by the causal mask
        padded[0, : t + 1] = text
        text.append(int(forward(model, padded)[0, t].argmax()))
    assert len(set(text)) > 2
    assert drawn.tolist() == likeliest.tolist() == [text[1:]] * 2
    begun = np.array([text[:4], [*text[:2], 9, 9], [1, 2, 3, 4]])
    rows = sample.sample_tokens(
        model, jax.random.key(0), begun, np.array([4, 2, 4]), length=6, temperature=0
    )
    assert rows[:2].tolist() == [text[4:], text[2:8]]  # padding is never read


def test_samples_follow_the_tempered_distribution():
    model, rows = _toy(5), 4000
    prompts = np.full((rows, 1), END_OF_TEXT_ID)
    drawn = sample.sample_tokens(
        model, jax.random.key(2), prompts, np.ones(rows), length=2, temperature=1.5
    )
    contexts = jnp.array([[END_OF_TEXT_ID, token] for token in range(5)])
    logits, _ = jax.jit(lambda model, ids: model(ids))(model, contexts)
    probabilities = np.asarray(jax.nn.softmax(logits / 1.5))  # [first token, T, V]
    for token in range(5):
        here = np.asarray(drawn[:, 0] == token)
        first, expected = probabilities[token, 0, token], probabilities[token, 1]
        assert here.mean() == pytest.approx(first, abs=4 * np.sqrt(0.25 / rows))
        found = np.bincount(np.asarray(drawn)[here, 1], minlength=5) / max(here.sum(), 1)
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / max(here.sum(), 1))
    few = sample.sample_tokens(
        model, jax.random.key(2), prompts, np.ones(rows), length=1, temperature=1.5, top_k=2
    )
    first = probabilities[0, 0]
    kept = np.where(first >= np.sort(first)[-2], first, 0) / np.sort(first)[-2:].sum()
    found = np.bincount(np.asarray(few)[:, 0], minlength=5) / rows
    assert np.abs(found - kept).max() < 4 * np.sqrt(0.25 / rows) and (found[kept == 0] == 0).all()


def test_prompts_are_the_beginnings_of_functions(run, tmp_path):
    tokenizer = Tokenizer.load(run.work)
    body = "\n".join(f"    x{i} = {i}" for i in range(6))
    beginnings = [f'def f{i}(x):\n    """Says {"much " * 9 * (i % 2)}."""\n' for i in range(8)]
    method = beginnings[0].replace("f0", "method")
    held = textwrap.indent(method + body, "    ")
    file = f"import os\n\n\nclass A:\n{held}\n\n\n{beginnings[0]}{body}"
    texts = [*(b + body for b in beginnings), file, "def broken(:\n", ""]
    ids = [[*tokenizer.encode(text), END_OF_TEXT_ID] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    tokens.save_array(tmp_path / "train.tokens.npy", np.concatenate(ids).astype(np.uint16))
    documents = np.stack([starts, np.ones(len(ids), np.int64)], axis=1)
    tokens.save_array(tmp_path / "train.documents.npy", documents)
    text = tokens.TokenFile(tmp_path, "train")
    longest = max(len(tokenizer.encode(b)) for b in (*beginnings[::2], method))
    settings = configs.SampleConfig(functions=True, prompt=longest, shards=2, batch=4)
    shards = [sample.Prompts(settings, text, tokenizer, seed=1)(shard) for shard in (0, 1)]
    said = [
        tokenizer.decode(row[:count].tolist())
        for rows, given in shards
        for row, count in zip(rows, given, strict=True)
    ]
    # The others are too long; a function that is in a file as well is one.
    assert set(said) == {*beginnings[::2], method} and len(said) == 8
    short = dataclasses.replace(settings, prompt=2)
    with pytest.raises(DataError, match="at most 2 tokens"):
        sample.Prompts(short, text, tokenizer, seed=1)


def test_some_shards_are_greedy():
    settings = configs.SampleConfig(temperature=0.7, greedy=0.4, prompt=1)
    temperatures = [settings.shard_temperature(shard) for shard in range(10)]
    assert sorted(temperatures) == [0.0] * 4 + [0.7] * 6 and temperatures[0] == 0.7


def test_sampled_documents_end_where_the_text_does(tmp_path):
    rows = np.array([[3, 0, 4, 5], [0, 6, 7, 0]], np.uint16)

    def documents(**changes) -> list[list[int]]:
        shard = sample.Shard(np.ones((2, 3), np.uint16), np.array([1, 3]), rows)
        np.savez(tmp_path / "00000.npz", **shard._asdict())
        settings = configs.SampleConfig(shards=1, **changes)
        return [piece.tolist() for piece in sample.sampled_documents(tmp_path, settings, 0)]

    assert documents() == documents(prompt=3) == [[3, 0], [4, 5], [0], [6, 7, 0]]
    assert documents(prompt=3, functions=True) == [[3, 0], [0]]
    with pytest.raises(DataError, match="step that draws it"):
        list(sample.sampled_documents(tmp_path, configs.SampleConfig(shards=2), 0))
