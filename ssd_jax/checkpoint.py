"""GPT-2 folders in the Hugging Face layout: reading, writing, and fetching from the hub.

A folder holds ``config.json`` and the weights as ``model.safetensors`` (whole, or sharded with
an index), ``pytorch_model.bin`` (likewise) or ``flax_model.msgpack``. Tensors are matched to
parameters by name. Every name and shape is checked before the first weight is read, and
nothing is guessed: a tensor that is missing, unexpected, misshapen or not finite is an error
that names it. No format is read by unrestricted unpickling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization, traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

from ssd_jax import files, gpt2, int8
from ssd_jax.errors import CheckpointError, ConfigError
from ssd_jax.gpt2 import GPT2, GPT2Config

DTYPES = ("float32", "bfloat16", "float16")
NUMERICS = (*DTYPES, "int8")

_LABEL = "ssd_jax_label"
# Names the layout of 8-bit weights in config.json; others refuse a method that they do not know.
_INT8 = {"quant_method": "ssd_jax_int8"}
_SAFETENSORS = "model.safetensors"
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_CONFIG_FILES = ("config.json",)
_MODEL_FILES = (*_CONFIG_FILES, _SAFETENSORS, _SAFETENSORS_INDEX, "model-*.safetensors")
_OTHER_MODEL_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*.bin",
    "flax_model.msgpack",
)

# Causal masks that old versions of transformers stored along with the weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# The general names transformers accepts for GPT-2's own.
_CONFIG_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Fields that would change the arithmetic in a way GPT2 does not implement.
_CONFIG_UNSUPPORTED = (
    "add_cross_attention",
    "is_encoder_decoder",
    "pruned_heads",
    "quantization_config",
)
# Far above any GPT-2, and low enough that a damaged size fails here and not in an allocation.
_MAX_LAYERS = 1000
_MAX_SIZE = 2**31 - 1


# ---------------------------------------------------------------------------- config.json


def load_config(path_or_name: str | os.PathLike) -> GPT2Config:
    """The architecture in a folder's ``config.json``.

    Fields without influence on the arithmetic are ignored; absent ones take the defaults of
    Hugging Face's ``GPT2Config``.

    Raises:
      CheckpointError: the folder or file is missing or is not a JSON object.
      ConfigError: it is not a GPT-2, or a field is unsupported, of the wrong type or absurd.
    """
    path = files.locate(path_or_name, _CONFIG_FILES) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no config.json; give a Hugging Face model folder")
    fields = files.read_json(path)
    try:
        return _parse_config(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_label(path_or_name: str | os.PathLike) -> str | None:
    """What :func:`save_model` was told about these weights, for instance that they are widened.

    Raises:
      CheckpointError: the folder or ``config.json`` is missing or damaged.
    """
    path = files.locate(path_or_name, _CONFIG_FILES) / "config.json"
    label = files.read_json(path).get(_LABEL)
    return label if isinstance(label, str) else None


def _parse_config(fields: dict[str, Any]) -> GPT2Config:
    kind = fields.get("model_type", "gpt2")
    if kind != "gpt2":
        raise ConfigError(f"model_type {kind!r} is not supported; only 'gpt2' is")
    for name in _CONFIG_UNSUPPORTED:
        if fields.get(name) and fields[name] != _INT8:
            raise ConfigError(
                f"{name}={fields[name]!r} is not supported; use a plain GPT-2 decoder"
            )
    fields = dict(fields)
    for alias, name in _CONFIG_ALIASES.items():
        if alias in fields and fields.setdefault(name, fields[alias]) != fields[alias]:
            raise ConfigError(f"{alias} and {name} differ; remove one of them")
    known = {field.name: field.default for field in dataclasses.fields(GPT2Config)}
    values = {name: fields[name] for name in known if name in fields}
    for name, value in values.items():
        if name.endswith("_token_id"):
            values[name] = _parse_token_id(name, value)
        else:
            _check_field(name, value, known[name])
    return GPT2Config(**values)


def _check_field(name: str, value: Any, default: Any):
    """Refuse a value of the wrong type; :class:`GPT2Config` itself checks the ranges."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            raise ConfigError(f"{name} must be a {type(default).__name__}, not {value!r}")
    elif isinstance(default, float):
        if not number or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name} must be a non-negative finite number, not {value!r}")
    elif number and value > (_MAX_LAYERS if name == "n_layer" else _MAX_SIZE):
        raise ConfigError(f"{name}={value!r} is absurdly large; config.json is damaged")


def _parse_token_id(name: str, value: Any) -> int | tuple[int, ...] | None:
    several = name == "eos_token_id" and isinstance(value, list)
    ids: list[Any] = value if several else [value]
    if value is None or not ids:
        return None
    if not all(type(i) is int and 0 <= i <= _MAX_SIZE for i in ids):
        raise ConfigError(f"{name} must be a token id, not {value!r}")
    return tuple(ids) if several else ids[0]


def _config_fields(config: GPT2Config, dtype: np.dtype) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **fields,
        "add_cross_attention": False,
        # The same fact for transformers before and since its fifth version.
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
    }


# -------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A stored tensor whose values are not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def default_dtype() -> str:
    """Type of matrix products if none is asked for: what suits the backend."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(
    path_or_name: str | os.PathLike,
    *,
    dtype: Any = "float32",
    exact: bool = False,
    turned: bool = False,
) -> GPT2:
    """A GPT-2 with the weights of a folder, or of a model on the Hugging Face hub.

    Args:
      path_or_name: a folder, or a hub name (``name`` or ``owner/name``) where no such folder
        exists. Only then is the network used.
      dtype: ``float32``, ``bfloat16`` or ``float16``: type of embeddings, kernels, matrix
        products and cache. Biases and layer norms are float32 in any case. ``int8`` rounds
        kernels and token embeddings to 8 bits (:mod:`ssd_jax.int8`), with attention and cache of
        the type that suits the backend. Weights stored in 8 bits stay so with every ``dtype``.
      exact: as for :class:`~ssd_jax.gpt2.GPT2`.
      turned: likewise.

    Raises:
      CheckpointError: something is missing, damaged, unexpected, misshapen or not finite.
      ConfigError: ``config.json`` or ``dtype`` asks for something unsupported.
    """
    folder = files.locate(path_or_name, _MODEL_FILES)
    result = abstract_model(folder, dtype=dtype, exact=exact, turned=turned)
    config, operands = result.config, result.dtype
    rounded = result.numerics == "int8" and not _holds_int8(folder)
    turned = result.turned and result.numerics != "int8"
    if not _weight_files(folder):
        folder = files.locate(path_or_name, _OTHER_MODEL_FILES)
    path, tensors = _open_weights(folder)
    # What is stored, of which the result is made while reading.
    model = result
    if rounded or turned:
        model = gpt2.abstract(config, dtype=operands, param_dtype=operands)
    elif result.numerics == "int8":
        model = gpt2.abstract(config, dtype=operands, param_dtype=np.int8, activations8=False)
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {_hf_name(keys): tuple(param.shape) for keys, param in params}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        shapes["lm_head.weight"] = shapes["wte.weight"]
    _check_tensors(path, tensors, shapes)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _check_tied(path, tensors)

    def read() -> Iterator[tuple[tuple, np.ndarray]]:
        for keys, param in params:
            name = _hf_name(keys)
            # 8 bits are rounded to from all the bits there are.
            dtype = np.dtype(np.float32) if rounded else param.dtype
            yield keys, _read_tensor(path, name, tensors[name], dtype)

    values = read()
    if rounded:
        values = gpt2.quantized(values)
    elif result.tiled:
        values = gpt2.tiled(values, "wte" if config.tie_word_embeddings else "lm_head")
    elif turned:
        values = gpt2.turned(values)
    return _with_weights(result, values)


def abstract_model(
    path_or_name: str | os.PathLike,
    *,
    dtype: Any = "float32",
    exact: bool = False,
    turned: bool = False,
) -> GPT2:
    """What :func:`load_model` would give, with shapes in place of weights: of a hub's model only
    ``config.json`` is fetched. Arguments and errors are the same."""
    rounded = _parse_dtype(dtype, NUMERICS) == jnp.int8
    operands = _parse_dtype(default_dtype() if rounded else dtype)
    eight = rounded or _holds_int8(path_or_name)
    config = load_config(path_or_name)
    stored = jnp.int8 if eight else operands
    return gpt2.abstract(config, dtype=operands, param_dtype=stored, exact=exact, turned=turned)


def _holds_int8(path_or_name: str | os.PathLike) -> bool:
    path = files.locate(path_or_name, _CONFIG_FILES) / "config.json"
    return path.is_file() and files.read_json(path).get("quantization_config") == _INT8


def quantize(model: GPT2) -> GPT2:
    """The model with its kernels and token embeddings rounded to 8 bits (:mod:`ssd_jax.int8`).

    Raises:
      ConfigError: it is an exact model, or of 8 bits already.
    """
    if model.exact or model.numerics == "int8":
        raise ConfigError("8 bits are made of the original; load it without exact or int8")
    rounded = gpt2.abstract(model.config, dtype=model.dtype, param_dtype=jnp.int8)
    return _with_weights(rounded, gpt2.quantized(gpt2.unturned(model)))


def _with_weights(model: GPT2, values: Iterable[tuple[tuple, Any]]) -> GPT2:
    """An abstract model with these weights by path, put on the device one at a time."""
    params = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, gpt2.Tiles))))

    # Copies, since JAX could otherwise alias memory that belongs to a file.
    def kept(value: Any, dtype: np.dtype) -> jax.Array:
        kind = int8.unsigned(value) if dtype == np.uint8 else np.array(value, dtype)
        return jax.device_put(kind)

    loaded = [(keys, params[keys].replace(kept(x, params[keys].dtype))) for keys, x in values]
    nnx.update(model, nnx.from_flat_state(loaded))
    return model


def _parse_dtype(dtype: Any, known: Sequence[str] = DTYPES) -> np.dtype:
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, not {dtype!r}")
    return parsed


def _hf_name(keys: Iterable[Any]) -> str:
    """Hugging Face's name, less ``transformer.``, of the parameter at ``keys`` in a GPT2."""
    name = ".".join(str(key) for key in keys)
    name = re.sub(r"\.(kernel|scale)$", ".weight", name)
    name = re.sub(r"\bkernel_scale$", "weight_scale", name)
    return f"{name}.weight" if "." not in name else name


def _check_tensors(path: Path, tensors: dict[str, _Tensor], shapes: dict[str, tuple[int, ...]]):
    """Raise unless the file holds exactly the tensors of the model."""
    for what, names in (
        ("missing", shapes.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - shapes.keys()),
    ):
        if names:
            first, *rest = sorted(names)
            more = f" and {len(rest)} more" if rest else ""
            raise CheckpointError(
                f"{path}: {what} tensor {first!r}{more}; the file and config.json do not match"
            )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, not "
                f"{list(shape)}; the file and config.json do not match"
            )


def _check_tied(path: Path, tensors: dict[str, _Tensor]):
    head, table = (
        _read_tensor(path, name, tensors[name]) for name in ("lm_head.weight", "wte.weight")
    )
    if not np.array_equal(head, table):
        raise CheckpointError(
            f"{path}: 'lm_head.weight' differs from 'wte.weight' although the head is tied; "
            "set tie_word_embeddings to false in config.json to use it"
        )


def _read_tensor(path: Path, name: str, tensor: _Tensor, dtype: Any = None) -> np.ndarray:
    with files.explaining(path, f"tensor {name!r} cannot be read"):
        value = tensor.read()
    return _to_finite(value, dtype or value.dtype, f"{path}: tensor {name!r}")


def _to_finite(value: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """``value`` as ``dtype``, refused if it is not of floats or if any is not finite.

    Int8 is for int8 alone.
    """
    if value.dtype == dtype == np.int8:
        return np.ascontiguousarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise CheckpointError(
            f"{what} is {value.dtype.name}; only float weights are supported, and 8-bit ones that "
            "ssd_jax has saved"
        )
    if dtype == np.int8:
        raise CheckpointError(f"{what} is {value.dtype.name} and not int8 as config.json says")
    # Judged after the cast, which can overflow; then the error says so and not NumPy.
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.ascontiguousarray(value, dtype)
    if not np.isfinite(value).all():
        raise CheckpointError(
            f"{what} holds NaN or infinite values as {value.dtype.name}; "
            "the weights are damaged or do not fit the type"
        )
    return value


# --------------------------------------------------------------------------- file formats


def _weight_files(folder: Path) -> list[str]:
    """The weight files in a folder, the one to prefer first."""
    return [name for name in _OPENERS if (folder / name).is_file()]


def _open_weights(folder: Path) -> tuple[Path, dict[str, _Tensor]]:
    """The folder's weight file, and its tensors by Hugging Face's name less ``transformer.``"""
    present = _weight_files(folder)
    if not present:
        raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(_OPENERS)}")
    usable = [name for name in present if ".bin" not in name or _has_torch()]
    path = folder / (usable or present)[0]
    with files.explaining(path, "cannot be read"):
        stored = _OPENERS[path.name](path)
    tensors = {}
    for stored_name, tensor in stored.items():
        name = stored_name.removeprefix("transformer.")
        if _MASK_BUFFER.fullmatch(name):
            continue
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} occurs twice; remove one of the two")
        tensors[name] = tensor
    return path, tensors


def _open_safetensors(path: Path) -> dict[str, _Tensor]:
    # The handle stays open, kept by the closures: values are read one tensor at a time.
    handle = safe_open(path, framework="numpy")

    def tensor(name: str) -> _Tensor:
        shape = tuple(handle.get_slice(name).get_shape())
        return _Tensor(shape, lambda: handle.get_tensor(name))

    return {name: tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)


def _open_index(path: Path) -> dict[str, _Tensor]:
    """All tensors of the shards an index lists, which lie in the same folder."""
    weight_map = files.read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch or export the model again")
    for shard in weight_map.values():
        # A name with a folder part could point anywhere on the machine.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
            raise CheckpointError(f"{path}: shard name {shard!r} is not a plain file name")
    tensors: dict[str, _Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():  # nor a pipe, which would never end
            raise CheckpointError(f"{path}: no file {shard!r} beside it; fetch the model again")
        opener = _open_torch if path.name.startswith("pytorch") else _open_safetensors
        with files.explaining(path.parent / shard, "cannot be read"):
            found = opener(path.parent / shard)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: tensor {min(twice)!r} occurs in two shards")
        tensors |= found
    if absent := weight_map.keys() - tensors.keys():
        raise CheckpointError(f"{path}: missing tensor {min(absent)!r}; a shard is incomplete")
    return tensors


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _open_torch(path: Path) -> dict[str, _Tensor]:
    if not _has_torch():
        raise CheckpointError(
            f"{path}: reading it needs torch; install torch, or convert the model where it is "
            "installed: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    import torch

    # weights_only admits tensors and plain containers: nothing in the file is executed.
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: is not a dictionary of tensors; export the model again")

    def tensor(name: Any, value: Any) -> _Tensor:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor; export the model again")
        # NumPy has no bfloat16 that torch knows; every float up to 32 bits widens exactly.
        widened = torch.float32 if value.is_floating_point() else value.dtype
        return _Tensor(tuple(value.shape), lambda: value.detach().to(widened).numpy())

    return {name: tensor(name, value) for name, value in state.items()}


def _open_flax(path: Path) -> dict[str, _Tensor]:
    """Tensors of a Flax checkpoint: kernels there are ``[out, in]``, the head's ``[E, V]``.

    Hugging Face's ``FlaxConv1D`` keeps the transpose of PyTorch's ``Conv1D``, and the head is
    a ``Dense``, the transpose of ``Linear``: so every kernel is transposed, no other tensor.
    """
    tree = serialization.msgpack_restore(path.read_bytes())
    tensors = {}
    for name, value in traverse_util.flatten_dict(tree, sep=".").items():
        if not isinstance(value, np.ndarray):
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor; export the model again")
        value = value.T if name.endswith(".kernel") else value
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        tensors[name] = _Tensor(value.shape, lambda value=value: value)
    return tensors


_OPENERS: dict[str, Callable[[Path], dict[str, _Tensor]]] = {
    _SAFETENSORS: _open_safetensors,
    _SAFETENSORS_INDEX: _open_index,
    "pytorch_model.bin": _open_torch,
    "pytorch_model.bin.index.json": _open_index,
    "flax_model.msgpack": _open_flax,
}


# --------------------------------------------------------------------------------- saving


def save_model(
    model: GPT2,
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    label: str | None = None,
):
    """Write ``config.json`` and safetensors weights that ``transformers`` loads unchanged.

    8-bit weights are for :func:`load_model` alone; ``transformers`` refuses them. Nothing appears
    under its final name before everything is written, so a failure in writing leaves what the
    folder held. Safetensors weights of an earlier model are replaced.

    Args:
      model: the model to save.
      folder: where to; made if absent.
      dtype: type of all stored tensors; by default each keeps its own. The config's ``dtype``
        is the widest stored, so that ``transformers`` rounds nothing on loading.
      max_shard_bytes: above this size the weights are split into several files with an index.
      label: what a reader of figures must know of these weights; kept in ``config.json``, see
        :func:`load_label`.

    Raises:
      CheckpointError: a weight is not finite (as ``dtype``), or the folder cannot be written.
      ConfigError: ``dtype`` is not one of :data:`DTYPES`, or the weights are of 8 bits and cannot
        take it.
    """
    folder = Path(folder)
    target = None if dtype is None else _parse_dtype(dtype)
    eight = model.numerics == "int8"
    if eight and target is not None:
        raise ConfigError(f"8-bit weights cannot be saved as {target.name}; leave dtype out")
    tensors = {}
    for keys, value in gpt2.unturned(model):
        name = _hf_name(keys)
        name = name if name == "lm_head.weight" else f"transformer.{name}"
        tensors[name] = _to_finite(np.asarray(value), target or value.dtype, f"tensor {name!r}")
    widest = max((tensor.dtype for tensor in tensors.values()), key=lambda d: d.itemsize)
    extra: dict[str, Any] = {_LABEL: label} if label else {}
    if eight:
        extra["quantization_config"] = _INT8
    shards = _split(tensors, max_shard_bytes)
    with files.explaining(folder, "cannot be written", "check the path and the free space"):
        folder.mkdir(parents=True, exist_ok=True)
        # The stack renames the last entered first: weights, then index, then config.
        with contextlib.ExitStack() as stack:

            def staged(name: str) -> Path:
                return stack.enter_context(files.atomic_path(folder / name))

            config = staged("config.json")
            files.write_json(config, _config_fields(model.config, widest) | extra)
            if len(shards) > 1:
                files.write_json(staged(_SAFETENSORS_INDEX), _index(shards))
            for name, shard in shards.items():
                path = staged(name)
                save_file(shard, path, metadata={"format": "pt"})
                shutil.copymode(config, path)  # the library lets the owner alone read it
        _remove_stale(folder, keep={*shards, _SAFETENSORS_INDEX} if len(shards) > 1 else {*shards})


def _split(tensors: dict[str, np.ndarray], limit: int) -> dict[str, dict[str, np.ndarray]]:
    """Tensors by file name, in order, each file within ``limit`` bytes or of one tensor."""
    groups: list[dict[str, np.ndarray]] = []
    room = 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = limit
        groups[-1][name] = tensor
        room -= tensor.nbytes
    if len(groups) == 1:
        return {_SAFETENSORS: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _index(shards: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _remove_stale(folder: Path, keep: set[str]):
    """Delete weights of an earlier save, which a loader would prefer to the new ones."""
    for pattern in (_SAFETENSORS, _SAFETENSORS_INDEX, "model-?????-of-?????.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink()
