"""Tiny models and stacks for the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from ssd_jax.gpt2 import GPT2, GPT2Config
from ssd_jax.ngram import KatzModel
from ssd_jax.stack import Stack
from ssd_jax.tokenizer import Tokenizer

VOCAB = 53


def model(seed: int = 0, *, width: int = 32, layers: int = 2, std: float = 0.4, **fields) -> GPT2:
    """A random GPT-2 whose weights are large enough for its choices to be decided."""
    config = dict(vocab_size=VOCAB, n_positions=96, n_head=4, bos_token_id=None, eos_token_id=None)
    config |= dict(n_embd=width, n_layer=layers, initializer_range=std) | fields
    return GPT2(GPT2Config(**config), rngs=nnx.Rngs(seed))


def blend(oracle: GPT2, amount: float, seed: int = 9) -> GPT2:
    """A draft that sometimes agrees: the oracle with noise on its weights."""
    graph, state = nnx.split(oracle)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        x + amount * jnp.std(x) * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(structure, noisy))


def stubborn(model: GPT2, token: int) -> GPT2:
    """A draft that ranks tokens alike after any text, by how near they are to one."""
    graph, state = nnx.split(model)
    own = nnx.merge(graph, state)
    own.ln_f.scale[...] = jnp.zeros_like(own.ln_f.scale[...])
    own.ln_f.bias[...] = own.wte[...][token]
    return own


def katz(vocab: int = VOCAB, seed: int = 0) -> KatzModel:
    """A trigram fitted to a few thousand random tokens."""
    rng = np.random.default_rng(seed)
    documents = [rng.zipf(1.3, 400).clip(max=vocab) - 1 for _ in range(8)]
    return KatzModel.fit(documents, vocab)


def stack(agreement: str = "between", drafts: int = 1, ngram: bool = True, **fields) -> Stack:
    """A stack whose drafts ``always``, ``never`` or (``between``) sometimes agree."""
    oracle = model(0, **fields)
    kinds = {
        "always": lambda i: oracle,
        "never": lambda i: model(50 + i, **fields),
        "between": lambda i: blend(oracle, 0.12 * (i + 1)),
    }
    return Stack(
        oracle,
        tuple(kinds[agreement](i) for i in range(drafts)),
        katz() if ngram else None,
    )


def byte_tokenizer(vocab: int = 270) -> Tokenizer:
    """A byte-level tokenizer with a few merges, so that tokens hold parts of characters."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x): return x + 1\n" * 40, "é漢字" * 40] * 4, trainer)
    return Tokenizer(backend)


def by_slot(cache) -> list[np.ndarray]:
    """Keys of all layers and values of all layers of a cache, each ``[B, S, H, I]``."""
    both = zip((cache.keys, cache.values), cache.slot_axes, strict=True)
    return [np.moveaxis(np.asarray(x), axis, 1) for group, axis in both for x in group]
