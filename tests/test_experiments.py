"""The comparisons that settings are chosen by: each figure against a slow reference."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from code_folder import write_code

from ssd_jax.errors import ConfigError
from ssd_jax.ngram import KatzModel
from ssd_jax.training import command, experiments, sample, surgery
from ssd_jax.training import config as configs
from ssd_jax.training.steps import Pipeline

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
SMALL = (
    "oracle.n_embd=16",
    "oracle.n_layer=1",
    "train_oracle.steps=30",
    "train_draft.steps=12",
    "train_draft.context=16",
    "tokenizer.vocab_size=280",
    "oracle.n_positions=320",
    "draft.n_positions=320",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = write_code(tmp_path_factory.mktemp("code"))
    work = tmp_path_factory.mktemp("run")
    config = configs.load(TINY, [f'data.folders=["{folder}"]', *SMALL])
    lines: list[str] = []
    made = Pipeline(config, work, work / "trio", say=lines.append)
    for step in ("tokenizer", "oracle", "draft"):
        getattr(made, step)()
    return made


def _table(text: str) -> list[dict[str, str]]:
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_corpora_are_compared_by_what_their_look_ups_guess(pipeline, capsys):
    lines: list[str] = []
    pipeline.say = lines.append
    pipeline.corpora([1.0, 1.5], 1)
    rows = _table(lines[-1])
    assert [row["counted on"] for row in rows] == [
        "draft's samples, T=1",
        "draft's samples, T=1.5",
        "oracle's greedy text",
        "training text",
        "training text, all of it",
    ]
    counts = [int(row["tokens"].replace(",", "")) for row in rows]
    assert counts[:3] == [64 * 256] * 3 and counts[3] == counts[4] > 1000  # all there is
    # Once more from the stored text, by hand.
    (folder,) = (pipeline.work / "corpora").iterdir()
    settings = configs.SampleConfig(shards=1, batch=64, length=256, temperature=1.0)
    model = KatzModel.fit(sample.sampled_documents(folder / "draft-1", settings, 0), 280)
    judged = np.load(folder / "judge-greedy" / "00000.npz")["drawn"]
    right = total = 0
    for row in judged:
        for document in np.split(row, np.flatnonzero(row == 0) + 1):
            before = (-1, -1)
            for token in map(int, document):
                right += int(np.argmax(model.log_probs(*before))) == token
                total += 1
                before = (before[1], token)
    assert float(rows[0]["greedy, guess"].rstrip("%")) == pytest.approx(
        100 * right / total, abs=0.6
    )
    again: list[str] = []
    pipeline.say = again.append
    pipeline.corpora([1.0, 1.5], 1)
    assert again == lines[-1:]  # nothing is drawn twice


def test_shapes_are_trained_alike_and_compared(pipeline):
    lines: list[str] = []
    pipeline.say = lines.append
    pipeline.shapes(["1x8", "2x16:20"])
    rows = _table(lines[-1])
    assert [row["layers x width"] for row in rows] == ["1x8", "2x16:20"]
    for row in rows:
        accepted, cost = float(row["accepted of 4, greedy"]), float(row["of the oracle's"])
        assert 0 <= accepted <= 4 and cost > 0
        assert float(row["speed, greedy"]) == pytest.approx(
            (1 + accepted) / (1 + 4 * cost), rel=0.05
        )
    assert any(re.match(r"1x8: step 12/12", line) for line in lines)


def test_shapes_learn_from_text_of_the_oracle_s_where_the_config_says_so(pipeline, tmp_path):
    config = dataclasses.replace(
        pipeline.config,
        train_draft=dataclasses.replace(pipeline.config.train_draft, generated=1.0),
        generated=dataclasses.replace(pipeline.config.generated, shards=1, batch=8),
    )
    lines: list[str] = []
    learning = Pipeline(config, pipeline.work, tmp_path, say=lines.append)
    logs = []
    for made in (pipeline, learning):
        shutil.rmtree(pipeline.work / "shapes", ignore_errors=True)
        made.shapes(["1x8"])
        logs.append((pipeline.work / "shapes" / "30" / "1x8" / "log.jsonl").read_text())
    assert any(line.startswith("generated: shard 1/1") for line in lines)
    assert _losses(logs[0]) != _losses(logs[1])


def _losses(log: str) -> list[float]:
    return [json.loads(line)["loss"] for line in log.splitlines()]


def test_accepted_tokens_are_those_of_chains_over_what_was_drawn():
    """Against one chain after the other, each token's distribution from a pass of its own."""
    oracle, draft = toys.model(seed=0), toys.model(seed=1)
    random = np.random.default_rng(0)
    prompts = random.integers(1, toys.VOCAB, (3, 4))
    drawn = random.integers(1, toys.VOCAB, (3, 7))
    drawn[1, 2], given = 0, np.array([4, 2, 1])
    shard = sample.Shard(prompts.astype(np.uint16), given, drawn.astype(np.uint16))

    def distribution(model, ids):
        return np.asarray(jax.nn.softmax(model(jnp.asarray([ids]))[0][0, -1]))

    expected: dict[str, list[float]] = {"greedy": [], "sampled": []}
    for prompt, count, text in zip(*shard, strict=True):
        text = text[:3] if 0 in text else text
        for start in range(len(text)):
            taken = {"greedy": 0.0, "sampled": 0.0}
            alive = dict.fromkeys(taken, 1.0)
            for place in range(start, min(start + 4, len(text))):
                ids = [*prompt[:count].tolist(), *text[:place].tolist()]
                p, q = (distribution(model, ids) for model in (oracle, draft))
                alive["greedy"] *= p.argmax() == q.argmax()
                alive["sampled"] *= np.minimum(p, q).sum()
                for kind in taken:
                    taken[kind] += alive[kind]
            for kind in taken:
                expected[kind].append(taken[kind])
    got = experiments.accepted(oracle, draft, shard, end_of_text=0)
    assert got == pytest.approx({kind: np.mean(own) for kind, own in expected.items()}, abs=1e-5)
    assert experiments.accepted(oracle, oracle, shard, end_of_text=0)["sampled"] > got["sampled"]


@pytest.mark.parametrize("text", ["96", "2x", "x96", "0x96", "2xmany", "2x96:", "2x96:0"])
def test_a_shape_is_layers_by_width(text):
    with pytest.raises(ConfigError, match="LAYERSxWIDTH"):
        experiments.parse_shape(text, 64)
    shape = experiments.parse_shape("2x96", 64)
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.n_positions) == (2, 96, 3, 64)
    assert shape.n_inner == 0 and experiments.parse_shape("2x96:312", 64).n_inner == 312


def test_chain_lengths_are_those_of_chains_that_end_with_the_text():
    rates = np.random.default_rng(0).random(9)
    expected = []
    for start in range(9):
        alive, accepted = 1.0, 0.0
        for rate in rates[start : start + 4]:
            alive *= rate
            accepted += alive
        expected.append(accepted)
    np.testing.assert_allclose(experiments.chain_lengths(rates, 4), expected)


def test_the_commands_reach_the_comparisons(monkeypatch, tmp_path, capsys):
    called = []
    monkeypatch.setattr(Pipeline, "corpora", lambda self, *args: called.append(args))
    monkeypatch.setattr(Pipeline, "shapes", lambda self, *args: called.append(args))
    base = ["--config", str(TINY), "--workdir", str(tmp_path)]
    assert command.main(["corpora", *base, "--temperatures", "0.5", "2", "--shards", "3"]) == 0
    assert command.main(["shapes", *base, "--shapes", "1x8"]) == 0
    assert called == [([0.5, 2.0], 3), (["1x8"],)]
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "corpora" in capsys.readouterr().out


def test_float32_copies_leave_the_model_alone():
    model = toys.model()
    copy = surgery.in_float32(model)
    ids = jnp.arange(5)[None]
    np.testing.assert_array_equal(*(jax.jit(lambda m: m(ids)[0])(m) for m in (model, copy)))
