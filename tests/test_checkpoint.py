"""Model folders: what is read and written, and that damage is refused by name."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx, serialization
from safetensors.numpy import load_file, save_file

from ssd_jax import checkpoint, gpt2
from ssd_jax.errors import CheckpointError, ConfigError, SsdError
from ssd_jax.gpt2 import GPT2, GPT2Config
from ssd_jax.training.surgery import widen

GOLDEN = Path(__file__).resolve().parent / "golden"

TINY = GPT2Config(
    **dict(vocab_size=19, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_inner=20),
    **dict(activation_function="silu", layer_norm_epsilon=1e-3, initializer_range=0.4),
    **dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, bos_token_id=3),
    **dict(tie_word_embeddings=False, eos_token_id=(4, 5), attn_pdrop=0.0),
)


@pytest.fixture(scope="module")
def tiny() -> GPT2:
    """A model whose every parameter, biases and norms included, is random."""
    model, rng = GPT2(TINY, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """The tiny model, saved; for the test to damage."""
    checkpoint.save_model(tiny, tmp_path / "model")
    return tmp_path / "model"


def weights(model: GPT2) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, keys)): np.asarray(param[...]) for keys, param in flat}


def assert_same_weights(actual: GPT2, expected: GPT2):
    assert weights(actual).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        assert weights(actual)[name].dtype == value.dtype, name
        np.testing.assert_array_equal(weights(actual)[name], value, err_msg=name)


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refusal(error: type[SsdError], folder, **kwargs) -> str:
    """The message of the expected error, which must be a single line."""
    with pytest.raises(error) as caught:
        checkpoint.load_model(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------- round trips


def test_saved_model_loads_with_equal_config_and_bits(tiny, folder):
    loaded = checkpoint.load_model(folder)
    assert loaded.config == TINY
    assert_same_weights(loaded, tiny)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_tiled_model_is_the_same_model(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "prefers_tiles", lambda: True)
    tiled = checkpoint.load_model(folder, turned=True)
    shapes = [model.h[0].mlp.c_fc.kernel[...].shape for model in (tiny, tiled)]
    assert shapes == [(8, 20), (20, 8)]
    assert tiled.tiled and not checkpoint.load_model(folder, dtype="bfloat16", turned=True).tiled
    checkpoint.save_model(tiled, tmp_path / "again")
    assert_same_weights(checkpoint.load_model(tmp_path / "again"), tiny)
    assert_same_weights(checkpoint.quantize(tiled), checkpoint.quantize(tiny))
    assert_same_weights(widen(tiled, width=16, layers=3), widen(tiny, width=16, layers=3))


def test_shards_hold_the_same_model_within_their_limit(tiny, tmp_path):
    checkpoint.save_model(tiny, tmp_path, max_shard_bytes=2000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 2000
    assert_same_weights(checkpoint.load_model(tmp_path), tiny)


@pytest.mark.parametrize(("first", "second"), [(2000, 10**9), (10**9, 2000), (2000, 4000)])
def test_saving_again_leaves_nothing_of_the_model_before(tiny, tmp_path, first, second):
    other = GPT2(TINY, rngs=nnx.Rngs(1))
    checkpoint.save_model(other, tmp_path, max_shard_bytes=first)
    checkpoint.save_model(tiny, tmp_path, max_shard_bytes=second)
    assert_same_weights(checkpoint.load_model(tmp_path), tiny)
    index = tmp_path / "model.safetensors.index.json"
    listed = (
        set(json.loads(index.read_text())["weight_map"].values())
        if index.exists()
        else {"model.safetensors"}
    )
    assert {path.name for path in tmp_path.glob("*.safetensors")} == listed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_round_once_and_keep_vectors_in_float32(tiny, folder, tmp_path, dtype):
    loaded = checkpoint.load_model(folder, dtype=dtype)
    assert loaded.dtype == jnp.dtype(dtype)
    for name, value in weights(tiny).items():
        expected = value.astype(jnp.dtype(dtype)) if value.ndim == 2 else value
        assert weights(loaded)[name].dtype == expected.dtype
        np.testing.assert_array_equal(weights(loaded)[name], expected, err_msg=name)
    # Saved as it is laid out, and then once more all in the narrow type.
    checkpoint.save_model(loaded, tmp_path / "again")
    assert_same_weights(checkpoint.load_model(tmp_path / "again", dtype=dtype), loaded)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"
    checkpoint.save_model(loaded, tmp_path / "narrow", dtype=dtype)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == dtype
    for name, value in load_file(tmp_path / "narrow" / "model.safetensors").items():
        assert value.dtype == jnp.dtype(dtype), name


def test_msgpack_and_safetensors_hold_the_same_model():
    # gpt2_flax and gpt2_plain were written from one model, the former with [out, in] kernels.
    flax_model = checkpoint.load_model(GOLDEN / "gpt2_flax")
    assert_same_weights(flax_model, checkpoint.load_model(GOLDEN / "gpt2_plain"))


def test_msgpack_head_is_transposed(tiny, tmp_path, folder):
    def nested(name: str, value: np.ndarray) -> dict:
        *path, leaf = name.split(".")
        if leaf in ("wte", "wpe"):
            path, leaf = [leaf], "embedding"
        elif leaf == "lm_head":
            path, leaf = [leaf], "kernel"
        node: dict = {leaf: value.T.copy() if leaf == "kernel" else value}
        for key in reversed(path if path[0] == "lm_head" else ["transformer", *path]):
            node = {key: node}
        return node

    def merge(a: dict, b: dict) -> dict:
        both = {k: merge(a[k], b[k]) for k in a.keys() & b.keys()}
        return a | b | both

    tree: dict = {}
    for name, value in weights(tiny).items():
        tree = merge(tree, nested(name, value))
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same_weights(checkpoint.load_model(folder), tiny)


def test_torch_file_of_an_early_version_loads():
    """Half precision, no ``transformer.`` prefix, and mask buffers among the weights."""
    pytest.importorskip("torch")
    legacy = checkpoint.load_model(GOLDEN / "gpt2_bin")
    assert_same_weights(legacy, checkpoint.load_model(GOLDEN / "gpt2_plain"))


def test_sharded_torch_files_load(tiny, folder):
    torch = pytest.importorskip("torch")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        part = {k: torch.tensor(v) for k, v in tensors.items() if weight_map[k] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_weights(checkpoint.load_model(folder), tiny)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_keys_load_with_and_without_the_prefix(tiny, folder, prefix):
    def rename(tensors):
        for name in list(tensors):
            bare = name.removeprefix("transformer.")
            if bare != "lm_head.weight":
                tensors[prefix + bare] = tensors.pop(name)

    edit_weights(folder, rename)
    assert_same_weights(checkpoint.load_model(folder), tiny)


def test_mask_buffers_are_ignored(tiny, folder):
    extra = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
        "h.1.attn.bias": np.ones((1, 1, 4, 4), bool),
        "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
    }
    edit_weights(folder, lambda tensors: tensors.update(extra))
    assert_same_weights(checkpoint.load_model(folder), tiny)


def test_transformers_loads_what_we_save_and_we_what_it_saves(tiny, folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert peer.config.eos_token_id == [4, 5]
    tokens = np.random.default_rng(0).integers(0, 19, (2, 12), np.int32)
    with torch.no_grad():
        expected = peer.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(tiny(tokens)[0], expected, atol=2e-4, rtol=0)
    peer.save_pretrained(tmp_path / "peer")
    back = checkpoint.load_model(tmp_path / "peer")
    assert back.config == TINY
    assert_same_weights(back, tiny)


# ---------------------------------------------------------------------------------- tied head


def make_tied(folder: Path, head) -> None:
    """Turn the saved model into a tied one that still stores a head made from ``wte``."""
    edit_config(folder, tie_word_embeddings=True)

    def change(tensors):
        tensors["lm_head.weight"] = head(tensors["transformer.wte.weight"])

    edit_weights(folder, change)


def test_stored_copy_of_a_tied_head_is_accepted(tiny, folder):
    make_tied(folder, np.copy)
    model = checkpoint.load_model(folder)
    assert model.lm_head is None
    np.testing.assert_array_equal(model.wte[...], tiny.wte[...])


@pytest.mark.parametrize("head", [lambda wte: wte + 1, lambda wte: wte[:-1].copy()])
def test_tied_head_that_differs_is_refused(folder, head):
    make_tied(folder, head)
    assert "lm_head.weight" in refusal(CheckpointError, folder)


def test_missing_untied_head_is_refused(folder):
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing tensor 'lm_head.weight'" in refusal(CheckpointError, folder)


# -------------------------------------------------------------------------- names and values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "missing tensor 'h.1.mlp.c_fc.bias'"),
        (
            lambda t: t.update({"transformer.h.2.ln_1.bias": np.zeros(8, np.float32)}),
            "unexpected tensor 'h.2.ln_1.bias'",
        ),
        (
            # A Linear's [out, in] layout where Conv1D's [in, out] belongs.
            lambda t: t.update(
                {"transformer.h.0.attn.c_attn.weight": np.zeros((24, 8), np.float32)}
            ),
            "'h.0.attn.c_attn.weight' has shape [24, 8], not [8, 24]",
        ),
        (
            lambda t: t.update({"wte.weight": t["transformer.wte.weight"].copy()}),
            "'wte.weight' occurs twice",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.zeros(8, np.int32)}),
            "'ln_f.bias' is int32",
        ),
    ],
    ids=["missing", "unexpected", "misshapen", "twice", "integer"],
)
def test_tensor_that_does_not_fit_is_named(folder, change, expected):
    edit_weights(folder, change)
    assert expected in refusal(CheckpointError, folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(folder, value):
    def spoil(tensors):
        tensors["transformer.h.1.attn.c_proj.weight"][3, 2] = value

    edit_weights(folder, spoil)
    message = refusal(CheckpointError, folder)
    assert "'h.1.attn.c_proj.weight'" in message and "NaN or infinite" in message


def test_weights_too_large_for_float16_are_refused_in_it_alone(folder):
    def enlarge(tensors):
        tensors["transformer.wpe.weight"][0, 0] = 1e6

    edit_weights(folder, enlarge)
    assert "float16" in refusal(CheckpointError, folder, dtype="float16")
    checkpoint.load_model(folder, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int16", "float64", "nonsense", None])
def test_unsupported_dtype_is_refused(folder, dtype):
    assert "dtype must be one of" in refusal(ConfigError, folder, dtype=dtype)


# -------------------------------------------------------------------------------------- config


def test_config_reads_every_field_and_the_general_names(tmp_path):
    fields = {"model_type": "gpt2", "hidden_size": 24, "num_hidden_layers": 3, "n_ctx": 1024}
    fields |= {"num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": [7]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=64, eos_token_id=(7,))
    assert checkpoint.load_config(tmp_path) == expected


def test_saved_config_holds_every_field(folder):
    stored = json.loads((folder / "config.json").read_text())
    for field in dataclasses.fields(TINY):
        value = getattr(TINY, field.name)
        assert stored[field.name] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("quantization_config", {"bits": 4}),
        ("pruned_heads", {"0": [1]}),
        ("hidden_size", 16),
        ("n_layer", 10**9),
        ("n_layer", 2.5),
        ("n_head", 3),
        ("n_inner", "20"),
        ("vocab_size", 10**30),
        ("vocab_size", -1),
        ("n_positions", None),
        ("activation_function", "prelu"),
        ("activation_function", ["gelu"]),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", float("inf")),
        ("initializer_range", -0.02),
        ("scale_attn_weights", 1),
        ("tie_word_embeddings", "yes"),
        ("attn_pdrop", 1.0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, -2]),
        ("bos_token_id", True),
    ],
)
def test_config_value_that_cannot_be_is_named(folder, name, value):
    edit_config(folder, **{name: value})
    message = refusal(ConfigError, folder)
    assert name in message and "config.json" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"n_embd": }', "\udcff", "[" * 100_000])
def test_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text, errors="surrogateescape")
    assert "config.json" in refusal(CheckpointError, folder)


# ------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 1500, -1])
def test_truncated_safetensors_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors" in refusal(CheckpointError, folder)


def test_flipped_header_bits_never_escape_as_another_error(tiny, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(0, header_end)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            # A flip in a blank or in the metadata is harmless: then the weights are intact.
            assert_same_weights(checkpoint.load_model(folder), tiny)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40


def test_huge_declared_shape_is_refused_before_allocation(folder):
    entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}
    header = json.dumps({"transformer.wte.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(CheckpointError, folder)


def test_config_larger_than_the_weights_is_refused_before_allocation(folder):
    edit_config(folder, n_embd=2**20, vocab_size=2**30)
    assert "has shape" in refusal(CheckpointError, folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        serialization.msgpack_serialize({"transformer": {"wte": "text"}}),
        serialization.msgpack_serialize({"transformer": {}}),
        b"\x91" * 100_000,
    ],
    ids=["empty", "reserved", "text", "leaf", "hollow", "deep"],
)
def test_damaged_msgpack_is_refused(folder, data):
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(data)
    assert "flax_model.msgpack" in refusal(CheckpointError, folder)


class Harmful:
    """What an attacker would put in a pickle: unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["garbage", "code", "not tensors"])
def test_torch_file_is_refused_and_runs_nothing(folder, tmp_path, content):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    path, trap = folder / "pytorch_model.bin", tmp_path / "trap"
    if content == "garbage":
        path.write_bytes(b"\x80\x02garbage")
    else:
        torch.save({"wte.weight": Harmful(trap)} if content == "code" else {"a": 1}, path)
    assert "pytorch_model.bin" in refusal(CheckpointError, folder)
    assert not trap.exists()


def test_without_torch_its_files_are_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_has_torch", lambda: False)
    assert "save_pretrained" in refusal(CheckpointError, GOLDEN / "gpt2_bin")
    # Where there is another format beside it, that one is read.
    shutil.copytree(GOLDEN / "gpt2_flax", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "gpt2_bin" / "pytorch_model.bin", tmp_path)
    plain = checkpoint.load_model(GOLDEN / "gpt2_plain")
    assert_same_weights(checkpoint.load_model(tmp_path), plain)


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret", "a/b", "..", "", 3])
def test_shard_outside_the_folder_is_refused(tiny, tmp_path, shard):
    folder = tmp_path / "model"
    checkpoint.save_model(tiny, folder, max_shard_bytes=2000)
    # The file is there and whole: only its place is wrong.
    save_file(
        {"transformer.wte.weight": np.asarray(tiny.wte[...])}, tmp_path / "secret.safetensors"
    )
    edit_index(folder, lambda i: i["weight_map"].update({"transformer.wte.weight": shard}))
    message = refusal(CheckpointError, folder)
    assert repr(shard) in message and "not a plain file name" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index.pop("weight_map"), "weight_map"),
        (lambda index: index.update(weight_map=[]), "weight_map"),
        (lambda index: index["weight_map"].update(ghost="gone.safetensors"), "gone.safetensors"),
        (
            lambda index: index["weight_map"].update(ghost=min(index["weight_map"].values())),
            "ghost",
        ),
    ],
)
def test_index_that_does_not_match_its_shards_is_refused(tiny, tmp_path, change, expected):
    checkpoint.save_model(tiny, tmp_path, max_shard_bytes=2000)
    edit_index(tmp_path, change)
    assert expected in refusal(CheckpointError, tmp_path)


def test_shards_may_be_links_to_files_and_nothing_else(tiny, tmp_path):
    """As the hub's cache has them. A pipe would be waited for without end."""
    checkpoint.save_model(tiny, tmp_path / "model", max_shard_bytes=2000)
    shard = min((tmp_path / "model").glob("model-*.safetensors"))
    blob = shard.rename(tmp_path / "blob")
    shard.symlink_to(blob)
    assert_same_weights(checkpoint.load_model(tmp_path / "model"), tiny)
    os.mkfifo(tmp_path / "pipe")
    for target in ("pipe", "nowhere", f"model/{shard.name}", "model"):
        shard.unlink()
        shard.symlink_to(tmp_path / target)
        assert shard.name in refusal(CheckpointError, tmp_path / "model")


def test_a_tensor_in_two_shards_is_refused(tiny, tmp_path):
    checkpoint.save_model(tiny, tmp_path, max_shard_bytes=2000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    assert "occurs in two shards" in refusal(CheckpointError, tmp_path)


def test_missing_shard_is_named(tiny, tmp_path):
    checkpoint.save_model(tiny, tmp_path, max_shard_bytes=2000)
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    assert shard.name in refusal(CheckpointError, tmp_path)


# --------------------------------------------------------------------------- failing to write


@pytest.mark.parametrize("failing", [1, 2])
def test_failed_save_leaves_the_folder_as_it_was(tiny, tmp_path, monkeypatch, failing):
    checkpoint.save_model(GPT2(TINY, rngs=nnx.Rngs(1)), tmp_path, max_shard_bytes=2000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        Path(path).write_bytes(b"half")
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save_model(tiny, tmp_path, max_shard_bytes=2000)
    assert len(calls) == failing
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_model_that_could_not_be_loaded_again_is_not_saved(tiny, tmp_path):
    model = nnx.clone(tiny)
    model.wpe[...] = model.wpe[...].at[0, 0].set(jnp.nan)
    with pytest.raises(CheckpointError, match="transformer.wpe.weight"):
        checkpoint.save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_onto_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save_model(tiny, tmp_path / "file")


# --------------------------------------------------------------------------- paths and the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, of the golden models, that records what it is asked for."""
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/down":
            raise OSError("no connection\nsecond line")
        target = tmp_path / "hub"
        target.mkdir(exist_ok=True)
        for path in (GOLDEN / name.removeprefix("org/")).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "path",
    [
        *("", "/no/such/folder", "./model", "../model", "a/b/c", "~/model", "model/", "x\0y"),
        *("C:\\model", "has blank", "n" * 5000 + "/x/y"),
    ],
)
def test_missing_path_never_reaches_the_hub(hub, path):
    assert "no such folder" in refusal(CheckpointError, path)
    assert not hub


def test_missing_path_object_or_neighbour_never_reaches_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for path in (Path("model"), "checkpoints/typo"):
        assert "no such folder" in refusal(CheckpointError, path)
    assert not hub


def test_existing_folder_never_reaches_the_hub(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    checkpoint.load_model(folder.name)
    assert not hub


def test_file_or_empty_folder_is_refused(folder, tmp_path):
    assert "not a folder" in refusal(CheckpointError, folder / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(CheckpointError, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(CheckpointError, folder)


def test_hub_model_fetches_other_formats_only_where_safetensors_lack(hub):
    flax_model = checkpoint.load_model("org/gpt2_flax")
    assert len(hub) == 2 and "flax_model.msgpack" in hub[1][1]
    hub.clear()
    plain = checkpoint.load_model("org/gpt2_plain")
    assert [name for name, _ in hub] == ["org/gpt2_plain"]
    assert not any("msgpack" in pattern or ".bin" in pattern for pattern in hub[0][1])
    assert_same_weights(flax_model, plain)


def test_hub_that_fails_is_one_line(hub):
    message = refusal(CheckpointError, "org/down")
    assert "org/down" in message and "no connection" in message


def test_weights_are_as_readable_as_the_config(tmp_path):
    checkpoint.save_model(toys.model(), tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == 1
