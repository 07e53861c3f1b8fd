"""Damaged and hostile files: every loader gives a value or a typed error, soon, in bounded memory.

``python tests/fuzzing.py --cases 20000`` prints how many cases of each format were tried; the test
suite runs a short form.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import toys
from flax import nnx

from ssd_jax import checkpoint, tuned
from ssd_jax.benchmark.prompts import read_prompts
from ssd_jax.costs import PassCosts
from ssd_jax.errors import PlanError, SsdError
from ssd_jax.gpt2 import GPT2
from ssd_jax.ngram import KatzModel
from ssd_jax.plan import DraftPlan, NGramPlan, Plan
from ssd_jax.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
SECONDS = 30  # a case that takes longer hangs
MEMORY = 8 * 2**30  # of address space, of which JAX itself takes a few

# Values that JSON fields are given.
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e-300, float("nan")]
ODD += [float("inf"), "", "x", "../../../etc/passwd", "\ud800", "\x00", [], {}, [[]], {"": None}]
ODD += [[1] * 1000, {"a": {"b": {"c": {}}}}]


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice([1, 4, 8, 100])
    return data[:start] + rng.choice([rng.randbytes(size), b"\xff" * size]) + data[start + size :]


def splice(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return rng.choice([data[:a] + data[b:], data[:b] + data[a:], data + data[a:b]])


def head(data: bytes, rng: random.Random) -> bytes:
    """Mostly the beginning, where formats keep their shapes and sizes."""
    return flip(data[:200], rng) + data[200:]


def fields(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with a value exchanged, a key twice, or nested very deeply."""
    kind = rng.randrange(8)
    if kind == 0:
        return b"[" * 100_000 + data
    text = data.decode()
    if kind == 1:
        return text.replace("{", rng.choice(['{"vocab_size": 7,', '{"a": 1, "a": 2,']), 1).encode()
    document = json.loads(text)
    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    for _ in range(rng.choice([1, 1, 3])):
        node, key = rng.choice(places)
        node[key] = rng.choice(ODD)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is sound JSON of the right length, with other contents: huge
    shapes, offsets that lie, a name twice."""
    size = int.from_bytes(data[:8], "little")
    changed = fields(data[8 : 8 + size], rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


BINARY = (flip, truncate, overwrite, splice, head)
SAFETENSORS = (*BINARY, header, header, header)
TEXT = (*BINARY, fields, fields, fields)


class Format:
    """One kind of file in a folder, and what reads it."""

    def __init__(self, folder: Path, file: str, load: Callable[[Path], Any], how=BINARY):
        self.folder, self.file, self.load, self.how = folder, file, load, how
        self.original = (folder / file).read_bytes()

    def try_one(self, rng: random.Random) -> str:
        """Damage, load; ``loaded`` or ``refused``. Anything else is an exception."""
        damaged = rng.choice(self.how)(self.original, rng)
        (self.folder / self.file).write_bytes(damaged)
        signal.alarm(SECONDS)
        try:
            value = self.load(self.folder)
            if isinstance(value, GPT2):
                for leaf in nnx.to_flat_state(nnx.state(value, nnx.Param)):
                    assert np.isfinite(np.asarray(leaf[1][...], np.float32)).all()
            return "loaded"
        except SsdError as error:
            message = str(error)
            assert message and "\n" not in message, f"not one line: {message!r}"
            return "refused"
        finally:
            signal.alarm(0)
            (self.folder / self.file).write_bytes(self.original)


def formats(base: Path) -> dict[str, Format]:
    """Small specimens of everything that is read."""
    model = toys.model()

    def folder(name: str) -> Path:
        (base / name).mkdir()
        return base / name

    whole, sharded = folder("whole"), folder("sharded")
    checkpoint.save_model(model, whole)
    checkpoint.save_model(model, sharded, max_shard_bytes=20_000)
    shard = next(p.name for p in sorted(sharded.glob("*.safetensors")))
    shutil.copytree(GOLDEN / "gpt2_flax", base / "flax")
    ngram, plan = folder("ngram"), folder("plan")
    toys.katz().save(ngram / "ngram.safetensors")
    staged = Plan(width=6, drafts=(DraftPlan(),), ngram=NGramPlan(), depth=4, nodes=16)
    (plan / "plan.json").write_text(staged.to_json())
    prompts = folder("prompts")
    (prompts / "p.jsonl").write_text('{"prompt": "def f():"}\n{"prompt": "é"}\n')
    load = checkpoint.load_model
    found = {
        "config.json": Format(whole, "config.json", load, TEXT),
        "safetensors": Format(whole, "model.safetensors", load, SAFETENSORS),
        "shard": Format(sharded, shard, load, SAFETENSORS),
        "index": Format(sharded, "model.safetensors.index.json", load, TEXT),
        "msgpack": Format(base / "flax", "flax_model.msgpack", load),
        "n-gram": Format(
            ngram,
            "ngram.safetensors",
            lambda f: KatzModel.load(f / "ngram.safetensors"),
            SAFETENSORS,
        ),
        "plan": Format(plan, "plan.json", lambda f: Plan.load(f / "plan.json"), TEXT),
        "prompts": Format(prompts, "p.jsonl", lambda f: read_prompts(f / "p.jsonl")),
    }
    found |= _tokenizers(folder("tokenizer"), folder("pair"))
    found["tuned plans"] = _tuned_plans(folder("tuned"))
    if importlib.util.find_spec("torch"):
        found |= _torch_weights(base / "torch", base / "split")
    return found


def _tokenizers(whole: Path, pair: Path) -> dict[str, Format]:
    """One in a file, with those that name its special tokens; and one as GPT-2's two files."""
    toys.byte_tokenizer().save(whole)
    names = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|endoftext|>"}
    (whole / "special_tokens_map.json").write_text(json.dumps(names))
    bpe = json.loads((whole / "tokenizer.json").read_text())["model"]
    (pair / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = ["#version: 0.2", *map(" ".join, bpe["merges"])]
    (pair / "merges.txt").write_text("\n".join(merges) + "\n")
    load = Tokenizer.load
    return {
        "tokenizer.json": Format(whole, "tokenizer.json", load, TEXT),
        "tokenizer_config": Format(whole, "tokenizer_config.json", load, TEXT),
        "special_tokens": Format(whole, "special_tokens_map.json", load, TEXT),
        "vocab.json": Format(pair, "vocab.json", load, TEXT),
        "merges.txt": Format(pair, "merges.txt", load),
    }


def _torch_weights(whole: Path, split: Path) -> dict[str, Format]:
    """In one file, and as a shard with its index."""
    import torch

    for folder in (whole, split):
        shutil.copytree(GOLDEN / "gpt2_bin", folder)
    name, shard = "pytorch_model.bin", "pytorch_model-1.bin"
    (split / name).rename(split / shard)
    tensors = torch.load(split / shard, map_location="cpu", weights_only=True)
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (split / f"{name}.index.json").write_text(json.dumps(index))
    load = checkpoint.load_model
    return {
        "torch": Format(whole, name, load),
        "torch shard": Format(split, shard, load),
        "torch index": Format(split, f"{name}.index.json", load, TEXT),
    }


def _tuned_plans(base: Path) -> Format:
    """What the tuner keeps in the user's cache folder; damaged it is ignored with a warning."""
    os.environ["SSD_JAX_CACHE"] = str(base)
    stack = toys.stack()
    costs = PassCosts({"oracle": {1: 0.1, 8: 0.2}, "draft": {1: 0.01}}, 256)
    path = tuned.save(stack, tuned.Tuned({"greedy": Plan.staged()}, {"greedy": 1.5}, costs))

    def load(_: Path) -> tuned.Tuned:
        found = tuned.load(stack)
        if found is None:
            raise PlanError("ignored")
        return found

    return Format(path.parent, path.name, load, TEXT)


def run(cases: int, seed: int, say: Callable[[str], None] = print) -> int:
    """Try so many cases of each format; the number that went wrong."""
    wrong = 0

    def hang(*_):
        raise TimeoutError(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as base, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in formats(Path(base)).items():
            rng = random.Random(f"{seed} {name}")
            counts: collections.Counter[str] = collections.Counter()
            began = time.perf_counter()
            for case in range(cases):
                try:
                    counts[kind.try_one(rng)] += 1
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    wrong += 1
                    counts["WRONG"] += 1
                    if counts["WRONG"] <= 3:
                        say(f"{name}, case {case}: {error!r:.300}")
                        say("".join(traceback.format_exception(error)[-3:]))
            seconds = time.perf_counter() - began
            figures = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            say(f"{name:<15} {cases} cases: {figures} ({seconds:.0f} s)")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of each format; default: 1000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    wrong = run(args.cases, args.seed)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
