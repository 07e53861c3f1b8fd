"""Memory: estimated before it is taken, refused where it cannot fit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax import batch, checkpoint, decode_command, files, gpt2, memory
from ssd_jax import decode as engine
from ssd_jax.errors import InsufficientMemoryError
from ssd_jax.plan import WIDE, Capacities, DraftPlan, Plan, Policy
from ssd_jax.sampling import Sampling

MIB = 2**20


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_model(toys.model(seed=1), tmp_path / "oracle")
    checkpoint.save_model(toys.model(seed=2), tmp_path / "draft")
    return tmp_path


def left(monkeypatch, size):
    monkeypatch.setattr(memory, "available", lambda: size)


def compiled_for(vocab: int, rows: int = 1, text: int = 512, chunk: int = 32):
    """The loop over two models of that vocabulary: these, its capacities, and XLA's analysis."""
    config = gpt2.GPT2Config(
        vocab_size=vocab, n_positions=text, n_embd=128, n_layer=2, n_head=4, eos_token_id=0
    )
    models = (gpt2.abstract(config), gpt2.abstract(config))
    plan = Plan(width=12, drafts=(DraftPlan(rounds=3),), depth=8, nodes=24, chunk=chunk)
    capacities = Capacities.of(plan, text)
    each = np.full((rows,), 8, np.int32)
    state = jax.eval_shape(
        lambda models: engine.init_state(
            models, np.zeros((rows, 8), np.int32), each, each + 50, each[:, None], capacities
        ),
        models,
    )
    sampling = Sampling.create(rows, temperature=1.0, top_k=50)
    arguments = (models, None, state, sampling, Policy.of(plan), each)
    analysis = engine.decode.lower(*arguments, capacities=capacities).compile().memory_analysis()
    assert analysis is not None
    return models, capacities, analysis


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("vocab", [2000, 20000])
def test_the_estimate_is_near_what_xla_allocates(rows, vocab):
    """Arguments, outputs that are no arguments, and temporary buffers of the compiled loop."""
    models, capacities, analysis = compiled_for(vocab, rows)
    real = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert 0.7 < memory.estimate(models, capacities, rows).total / real < 1.6


def test_a_long_prompt_takes_the_memory_of_its_chunks():
    """Four times the text takes no more for its passes but the rows of scores that it adds."""
    temporary = {
        (text, chunk): compiled_for(2000, 1, text, chunk)[2].temp_size_in_bytes
        for text, chunk in ((512, 16), (2048, 16), (2048, 1024))
    }
    scores = 4 * 4 * WIDE * 16 * 2048  # bytes, of one layer: heads, rows, slots
    assert temporary[2048, 16] < temporary[512, 16] + 4 * scores
    assert temporary[2048, 1024] > 8 * temporary[2048, 16]


def loaded_bytes(folder) -> int:
    """Of oracle and draft, the second copies that a CPU decodes with among them."""
    return 2 * memory.weights(checkpoint.load_model(folder / "oracle", turned=True))


def test_weights_that_cannot_fit_are_refused_unread(folder, monkeypatch):
    needed = loaded_bytes(folder)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("read"))
    left(monkeypatch, needed - 1)
    with pytest.raises(InsufficientMemoryError, match="narrower dtype"):
        ssd_jax.load(folder)
    with pytest.raises(MemoryError):
        ssd_jax.load(oracle=folder / "oracle", drafts=[folder / "draft"])


def test_weights_that_fit_are_read(folder, monkeypatch):
    monkeypatch.setattr(gpt2, "prefers_tiles", lambda: True)
    needed = loaded_bytes(folder)
    assert needed > 2 * memory.weights(toys.model())
    for size in (needed, None):
        left(monkeypatch, size)
        assert ssd_jax.load(folder).drafts
    left(monkeypatch, 0.7 * needed)
    assert ssd_jax.load(folder, dtype="bfloat16").oracle.dtype == jnp.bfloat16


def test_a_batch_that_cannot_fit_is_refused_uncompiled(monkeypatch):
    stack = toys.stack("between")
    monkeypatch.setattr(batch, "_program", lambda *_: pytest.fail("compiled"))
    left(monkeypatch, 100)
    with pytest.raises(InsufficientMemoryError, match="a batch of 3 rows .* lower batch_size"):
        ssd_jax.generate(stack, [[1], [2], [3]], max_new_tokens=8)


def test_what_the_device_says_gets_a_remedy():
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12 bytes"), MemoryError()):
        refused = pytest.raises(InsufficientMemoryError, match="a batch ran out of memory; lower")
        with refused, memory.reported("a batch"):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.reported("a batch"):
        raise jax.errors.JaxRuntimeError("INTERNAL: else")


def test_a_file_that_is_whole_is_not_blamed(folder, monkeypatch):
    def starve(*_, **__):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "load_model", starve)
    with pytest.raises(InsufficientMemoryError, match="the stack ran out of memory; take a sm"):
        ssd_jax.load(folder)
    refused = pytest.raises(InsufficientMemoryError, match="weights.bin: cannot be read for want")
    with refused, files.explaining(Path("weights.bin"), "cannot be read"):
        raise MemoryError


def test_this_machine_says_what_is_left():
    some = memory.available()
    assert some is not None and 16 * MIB < some < 2**50


def test_named_models_are_announced(folder, capsys, monkeypatch):
    argv = ["--oracle", str(folder / "oracle"), "--prompt-tokens", "1,2", "--max-new-tokens", "4"]
    assert decode_command.main(argv) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("float32, about ") and "weights" in first and "caches" in first
    left(monkeypatch, 1000)
    assert decode_command.main(argv) == 2
    assert "error: the stack in float32 needs about" in capsys.readouterr().err


def test_a_further_text_does_not_go_through_the_modules(monkeypatch):
    """Adding up their weights and flattening them took as long as six steps of a real oracle."""
    stack = toys.stack()
    ssd_jax.generate(stack, [1, 2, 3], max_new_tokens=4)

    def walked(*_):
        raise AssertionError("went through a module")

    program, called = batch._program, []

    def seen(arguments, capacities):
        called.append(jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, gpt2.GPT2)))
        return program(arguments, capacities)

    monkeypatch.setattr(memory.nnx, "state", walked)
    monkeypatch.setattr("ssd_jax.stack.Flat.of", walked)
    monkeypatch.setattr(batch, "_program", seen)
    again = ssd_jax.generate(stack, [1, 2, 3], max_new_tokens=4)
    assert again.stats.relative_bandwidth > 0
    assert called and not any(isinstance(x, gpt2.GPT2) for leaves in called for x in leaves)


def test_models_of_other_sizes_are_not_taken_for_each_other():
    small, large = toys.model(seed=1), toys.model(seed=1, layers=3)
    for model in (small, large, small):
        leaves = jax.tree.leaves(model)
        assert memory.weights(model) == sum(leaf.nbytes for leaf in leaves)
    assert memory.weights(small) < memory.weights(large)
