"""The forward pass against transformers, and every way of running it against the plain one."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from safetensors.numpy import load_file

from ssd_jax import checkpoint, gpt2, kv_cache
from ssd_jax.errors import ConfigError
from ssd_jax.gpt2 import GPT2, GPT2Config
from ssd_jax.plan import Plan

GOLDEN = Path(__file__).resolve().parent / "golden"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))
TOLERANCE = 2e-4

TINY = GPT2Config(
    vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4
)


@jax.jit
def forward(model, tokens, positions=None, mask=None, cache=None, offset=0):
    return model(tokens, positions, mask=mask, cache=cache, offset=offset)


in_each_layout = pytest.mark.parametrize("tiny", ["einsum", "xla", "turned"], indirect=True)


@pytest.fixture(scope="module", params=["einsum", "xla"])
def tiny(request, tmp_path_factory) -> GPT2:
    """In two layouts of the cache, or in all of them (``in_each_layout``)."""
    if request.param != "turned":
        return GPT2(TINY, attention=request.param, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save_model(GPT2(TINY, rngs=nnx.Rngs(0)), folder)
    return checkpoint.load_model(folder, turned=True)


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length), np.int32)


# ------------------------------------------------------------------ parity with transformers


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_golden(name, turned):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits, cache = checkpoint.load_model(GOLDEN / name, turned=turned)(expected["tokens"])
    assert cache is None and logits.dtype == jnp.float32
    assert expected["logits"].std() > 1000 * TOLERANCE
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("outputs", [61, 64, 67, 87, 128])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 5), (1, 12), (3, 4), (2, 40), (1, 128), (1, 129)]
)
def test_products_of_either_layout_are_the_same_for_any_number_of_rows(shape, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, 24)).astype(np.float32)
    weights = rng.normal(size=(outputs, 24)).astype(np.float32)
    tiles = gpt2.Tiles.of(weights)
    assert tiles.shape == gpt2.Tiles.empty(24, outputs)[...].shape
    products = [
        jax.jit(gpt2._turned_product, static_argnums=2)(x, weights, jnp.dtype("float32")),
        jax.jit(gpt2._tiled_product, static_argnums=(2, 3))(
            x, tiles, outputs, jnp.dtype("float32")
        ),
    ]
    for product in products:
        assert product.dtype == jnp.float32
        np.testing.assert_allclose(product, x @ weights.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "kinds", "expected"),
    [
        (512, {"turned": True}, True),
        (512, {}, False),
        (576, {"turned": True}, False),
        (512, {"turned": True, "exact": True}, False),
        (512, {"turned": True, "param_dtype": jnp.bfloat16}, False),
    ],
)
def test_small_turned_models_in_float32_have_tiles(width, kinds, expected, monkeypatch):
    for preferred in (True, False):
        monkeypatch.setattr(gpt2, "prefers_tiles", lambda preferred=preferred: preferred)
        model = gpt2.abstract(dataclasses.replace(TINY, n_embd=width), **kinds)
        tiles = nnx.to_flat_state(nnx.state(model, gpt2.Tiles))
        assert model.tiled == (expected and preferred) == bool(tiles)


def test_each_kind_of_products_has_costs_of_its_own_in_the_default_plan(monkeypatch):
    def model(width: int, **kinds) -> GPT2:
        return gpt2.abstract(dataclasses.replace(TINY, n_embd=width), turned=True, **kinds)

    monkeypatch.setattr(gpt2, "prefers_tiles", lambda: True)
    models = [model(512), model(576), model(512, param_dtype=jnp.int8)]
    monkeypatch.setattr(gpt2, "prefers_tiles", lambda: False)
    models += [model(512), model(576)]
    kinds = [each.products for each in models]
    assert kinds == ["tiled", "wide", "int8", "untiled", "wide"]
    plans = {kind: Plan.staged(1, True).on_cpu([0.1], kind) for kind in kinds}
    assert len({(plan.row_cost, plan.drafts[0].cost) for plan in plans.values()}) == 4
    assert {kind: plan.width for kind, plan in plans.items() if plan.width != 8} == {"tiled": 5}


def test_a_sampled_text_has_half_as_many_nodes_where_the_draft_is_a_trifle():
    default = Plan.staged(1, True)
    plans = {sampled: default.on_cpu([0.01], "wide", sampled=sampled) for sampled in (False, True)}
    assert (plans[False].width, plans[True].width) == (16, 8)
    assert plans[True].depth == 7, "no level that the oracle cannot look at"
    for share, products in ((0.1, "wide"), (0.01, "int8"), (0.1, "tiled")):
        assert default.on_cpu([share], products) == default.on_cpu([share], products, sampled=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13])
def test_few_rows_are_multiplied_by_tiles_and_more_by_kernels(tmp_path, rows, tied, monkeypatch):
    monkeypatch.setattr(gpt2, "prefers_tiles", lambda: True)
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    checkpoint.save_model(GPT2(config, rngs=nnx.Rngs(0)), tmp_path)
    model = checkpoint.load_model(tmp_path, turned=True)
    tokens = random_tokens(1, rows)
    mask = jnp.tri(rows, 16, dtype=bool)[None]
    expected = forward(model, tokens, mask=mask, cache=model.init_cache(1, 16))[0]
    for path, tiles in nnx.to_flat_state(nnx.state(model, gpt2.Tiles)):
        assert tiles[...].any(), path
        tiles[...] = jnp.zeros_like(tiles[...])
    logits = forward(model, tokens, mask=mask, cache=model.init_cache(1, 16))[0]
    assert bool(jnp.any(expected)) and bool(jnp.any(logits)) == (rows > 12)


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("gpt2_plain", "n_head", 4),
        ("gpt2_plain", "activation_function", "gelu"),
        ("gpt2_exact_gelu_inner", "activation_function", "gelu_new"),
        ("gpt2_relu_unscaled", "scale_attn_weights", True),
        ("gpt2_silu_by_layer", "scale_attn_by_inverse_layer_idx", False),
        ("gpt2_tanh_epsilon", "layer_norm_epsilon", 1e-5),
        ("gpt2_quick_gelu_upcast", "scale_attn_by_inverse_layer_idx", False),
    ],
)
def test_golden_notices_a_field_that_is_ignored(name, field, wrong):
    """The parity test would fail if the model disregarded this config field."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    model = checkpoint.load_model(GOLDEN / name)
    other = gpt2.abstract(dataclasses.replace(model.config, **{field: wrong}))
    nnx.update(other, nnx.state(model, nnx.Param))
    assert np.abs(other(expected["tokens"])[0] - expected["logits"]).max() > 2 * TOLERANCE


def test_golden_covers_a_separate_head():
    assert not checkpoint.load_config(GOLDEN / "gpt2_untied").tie_word_embeddings
    assert len(MODELS) == 7


@pytest.mark.parametrize("name", sorted(gpt2.ACTIVATIONS))
def test_activation_agrees_with_golden(name):
    golden = load_file(GOLDEN / "activations.safetensors")
    actual = gpt2.ACTIVATIONS[name](jnp.asarray(golden["inputs"]))
    np.testing.assert_allclose(actual, golden[name], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("scaled", "by_layer", "tied"), list(itertools.product([True, False], repeat=3))
)
def test_logits_agree_with_transformers(tmp_path, scaled, by_layer, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **dict(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=3, n_inner=20),
        # Rates that would wreck the logits if dropout were on.
        **dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        **dict(scale_attn_weights=scaled, scale_attn_by_inverse_layer_idx=by_layer),
        **dict(reorder_and_upcast_attn=by_layer, tie_word_embeddings=tied, initializer_range=0.4),
        **dict(activation_function="gelu_new" if tied else "mish", bos_token_id=0, eos_token_id=0),
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(config).eval()
    peer.save_pretrained(tmp_path)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.std() > 1000 * TOLERANCE
    logits, _ = checkpoint.load_model(tmp_path)(tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


# --------------------------------------------------------------------- size, type and dropout


def test_gpt2_large_has_the_published_number_of_parameters():
    large = gpt2.abstract(GPT2Config(n_embd=1280, n_layer=36, n_head=20))
    assert gpt2.parameter_count(large) == 774_030_080


def test_bfloat16_is_close_to_float32(tiny):
    model = gpt2.abstract(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(nnx.state(model)):
        # Matrices and tables are stored in bfloat16; biases and layer norms are not.
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim == 2 else jnp.float32)
    layout, weights = nnx.state(model), nnx.state(tiny)
    nnx.update(model, jax.tree.map(lambda leaf, x: x.astype(leaf.dtype), layout, weights))
    tokens = random_tokens(2, 24)
    exact, (rounded, _) = np.asarray(forward(tiny, tokens)[0]), forward(model, tokens)
    error = np.abs(exact - rounded)
    assert rounded.dtype == jnp.float32
    assert error.max() > 0 and error.mean() < 0.03 * exact.std()
    assert model.init_cache(1, 4).keys[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_acts_only_when_given_rngs(rate):
    off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2(dataclasses.replace(TINY, **(off | {rate: 0.5})), rngs=nnx.Rngs(0))
    without = GPT2(dataclasses.replace(TINY, **off), rngs=nnx.Rngs(0))
    tokens = random_tokens(1, 8)
    plain = without(tokens)[0]
    np.testing.assert_array_equal(without(tokens, rngs=nnx.Rngs(dropout=1))[0], plain)
    np.testing.assert_array_equal(model(tokens)[0], plain)
    dropped = [model(tokens, rngs=nnx.Rngs(dropout=seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - plain).max() > 0.01
    assert np.abs(dropped[0] - dropped[2]).max() > 0.01


@pytest.mark.parametrize(
    "fields",
    [
        dict(n_head=3),
        dict(n_layer=0),
        dict(n_inner=0),
        dict(vocab_size=True),
        dict(activation_function="softmax"),
        dict(attn_pdrop=1.0),
        dict(layer_norm_epsilon=0.0),
    ],
)
def test_impossible_config_is_refused_by_name(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GPT2Config(**({"n_embd": 16, "n_head": 2} | fields))


# ------------------------------------------------------------------------ cache and tree pass


def causal(batch: int, rows: int, slots: int, offset) -> np.ndarray:
    """``[B, T, S]``: token ``t`` of row ``b`` sees the slots up to ``offset[b] + t``."""
    last = np.broadcast_to(offset, (batch,))[:, None] + np.arange(rows)
    return np.arange(slots) <= last[:, :, None]


def test_chunks_and_single_steps_equal_one_full_pass(tiny):
    tokens = random_tokens(2, 16)
    full, _ = forward(tiny, tokens)
    cache, pieces = tiny.init_cache(2, 20), []
    for start, stop in itertools.pairwise([0, 5, 10, *range(11, 17)]):
        rows = stop - start
        positions = np.broadcast_to(np.arange(start, stop), (2, rows))
        mask = causal(2, rows, 20, start)
        logits, cache = forward(tiny, tokens[:, start:stop], positions, mask, cache, start)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(cache.length, 0)  # committing is the caller's


def test_ragged_rows_continue_each_from_its_own_length(tiny):
    tokens, lengths = random_tokens(3, 12), np.array([3, 7, 5])
    full, _ = forward(tiny, tokens)
    # The prompt is padded to one length; what lies above a row's own is overwritten later.
    positions = np.broadcast_to(np.arange(8), (3, 8))
    mask = causal(3, 8, 16, 0)
    _, cache = forward(tiny, tokens[:, :8], positions, mask, tiny.init_cache(3, 16), 0)
    following = np.take_along_axis(tokens, lengths[:, None] + np.arange(4), axis=1)
    positions = lengths[:, None] + np.arange(4)
    logits, _ = forward(tiny, following, positions, causal(3, 4, 16, lengths), cache, lengths)
    for row, start in enumerate(lengths):
        np.testing.assert_allclose(logits[row], full[row, start : start + 4], atol=2e-5, rtol=0)


# Five nodes after a text:    0 ─┬─ 1 ─── 3
#                                └─ 2 ─── 4
PARENTS = [-1, 0, 0, 1, 2]
DEPTHS = [0, 1, 1, 2, 2]
ANCESTORS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ],
    bool,
)


def tree_pass(model, text, nodes, *, gap: int):
    """Logits of the nodes and the cache; the block lies ``gap`` slots above the text."""
    (batch, length), slots, offset = text.shape, 32, text.shape[1] + gap
    positions = np.broadcast_to(np.arange(length), text.shape)
    mask = causal(batch, length, slots, 0)
    _, cache = forward(model, text, positions, mask, model.init_cache(batch, slots), 0)
    cache = dataclasses.replace(cache, length=jnp.full((batch,), length, jnp.int32))
    mask = np.zeros((batch, 5, slots), bool)
    mask[:, :, :length] = True
    mask[:, :, offset : offset + 5] = ANCESTORS
    positions = np.broadcast_to(length + np.array(DEPTHS), (batch, 5))
    return forward(model, nodes, positions, mask, cache, offset)


@in_each_layout
def test_tree_pass_equals_one_pass_per_branch(tiny):
    text, nodes = random_tokens(2, 9), random_tokens(2, 5, seed=1)
    logits, _ = tree_pass(tiny, text, nodes, gap=4)
    for branch in ([0, 1, 3], [0, 2, 4]):
        alone, _ = forward(tiny, np.concatenate([text, nodes[:, branch]], axis=1))
        np.testing.assert_allclose(logits[:, branch], alone[:, 9:], atol=2e-5, rtol=0)


@in_each_layout
def test_keeping_a_branch_gives_the_cache_of_a_plain_prefill(tiny):
    text, nodes = random_tokens(2, 9), random_tokens(2, 5, seed=1)
    _, cache = tree_pass(tiny, text, nodes, gap=4)
    # Row 0 accepts 0-2-4, row 1 only 0-1.
    branches, counts = [[0, 2, 4], [0, 1]], [3, 2]
    slots = np.array([[13, 15, 17], [13, 14, 0]], np.int32)
    kept = jax.jit(kv_cache.keep)(cache, slots, jnp.asarray(counts, jnp.int32))
    np.testing.assert_array_equal(kept.length, [12, 11])
    for row, branch in enumerate(branches):
        tokens = np.concatenate([text[row], nodes[row, branch]])[None]
        size = tokens.shape[1]
        positions, mask = np.arange(size)[None], causal(1, size, 32, 0)
        _, plain = forward(tiny, tokens, positions, mask, tiny.init_cache(1, 32), 0)
        for ours, plainly in zip(toys.by_slot(kept), toys.by_slot(plain), strict=True):
            np.testing.assert_allclose(ours[row, :size], plainly[0, :size], atol=2e-5, rtol=0)


@in_each_layout
def test_pending_rows_settle_with_the_next_block(tiny):
    text, nodes, after = (random_tokens(2, n, seed=n) for n in (9, 5, 2))
    _, cache = tree_pass(tiny, text, nodes, gap=4)
    # Row 0 accepts 0-2-4, row 1 only 0-1; the next block follows behind room for all three.
    branches, pending = [[0, 2, 4], [0, 1]], np.array([[13, 15, 17], [13, 14, -1]], np.int32)
    cache = dataclasses.replace(cache, pending=jnp.asarray(pending))
    held = kv_cache.held(cache)
    np.testing.assert_array_equal(held, [12, 11])
    mask = np.arange(32) < held[:, None, None]
    mask = np.repeat(mask, 2, axis=1) | (causal(2, 2, 32, 12) & (np.arange(32) >= 12))
    positions = held[:, None] + np.arange(2)
    logits, _ = forward(tiny, after, positions, mask, cache, cache.length)
    settled = kv_cache.settle(cache)
    assert settled.pending is None
    for row, branch in enumerate(branches):
        tokens = np.concatenate([text[row], nodes[row, branch], after[row]])[None]
        alone, _ = forward(tiny, tokens)
        np.testing.assert_allclose(logits[row], alone[0, -2:], atol=2e-5, rtol=0)
        for before, moved in zip(toys.by_slot(cache), toys.by_slot(settled), strict=True):
            expected = before[row, pending[row, : len(branch)]]
            np.testing.assert_array_equal(moved[row, 9 : 9 + len(branch)], expected)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("offset", [2, [0, 3, 5]])
def test_write_places_rows_from_each_offset(offset, axis):
    rng = np.random.default_rng(0)
    buffer, rows = (rng.normal(size=(3, n, 2, 4)).astype(np.float32) for n in (8, 3))
    expected = buffer.copy()
    for b, start in enumerate(np.broadcast_to(offset, 3)):
        expected[b, start : start + 3] = rows[b]
    placed = (jnp.moveaxis(x, 1, axis) for x in (buffer, rows))
    written = kv_cache.write(*placed, jnp.array(offset), axis)
    np.testing.assert_array_equal(jnp.moveaxis(written, axis, 1), expected)


@pytest.mark.parametrize("axes", [kv_cache.PLAIN, kv_cache.TURNED, kv_cache.FUSED])
def test_keep_moves_the_named_slots_of_each_row(axes):
    rng = np.random.default_rng(1)
    length, count = np.array([0, 4, 2]), np.array([3, 0, 2])
    slots = rng.integers(7, 12, (3, 3)).astype(np.int32)
    # Per layer and kind its own numbers, so that swapped buffers would show.
    buffers = [jnp.asarray(rng.normal(size=(3, 12, 2, 4)), jnp.float32) for _ in range(4)]
    keys, values = (
        tuple(jnp.moveaxis(x, 1, axis) for x in group)
        for group, axis in zip((buffers[:2], buffers[2:]), axes, strict=True)
    )
    cache = kv_cache.KVCache(keys, values, jnp.asarray(length), slot_axes=axes)
    kept = jax.jit(kv_cache.keep)(cache, slots, count)
    np.testing.assert_array_equal(kept.length, length + count)
    for before, after in zip(map(np.asarray, buffers), toys.by_slot(kept), strict=True):
        for b in range(3):
            moved = before[b, slots[b, : count[b]]]
            expected = np.concatenate([before[b, : length[b]], moved])
            np.testing.assert_array_equal(after[b, : length[b] + count[b]], expected)


def _dot_products(jaxpr):
    """Every matrix product in a program, nested ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _dot_products(inner)


def test_training_in_bfloat16_multiplies_no_float32_matrices():
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    gradients, programs = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = GPT2(config, dtype=dtype, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)

        def loss(params, graph=graph):
            logits, _ = nnx.merge(graph, params)(tokens)
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])

        gradients[dtype] = jax.jit(jax.grad(loss))(params)
        programs[dtype] = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    operands = [v.aval.dtype for eqn in _dot_products(programs[jnp.bfloat16]) for v in eqn.invars]
    assert len(operands) >= 2 * 3 * 7  # two attention and five dense products, and their gradients
    assert set(operands) == {jnp.dtype(jnp.bfloat16)}
    pairs = zip(*(jax.tree.leaves(gradients[d]) for d in gradients), strict=True)
    for exact, rounded in pairs:
        scale = float(jnp.abs(exact).max())
        np.testing.assert_allclose(rounded, exact, atol=0.05 * scale + 1e-6)
