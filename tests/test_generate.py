"""The public interface on tiny stacks: loading, generating, streaming, refusing."""

import dataclasses
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import toys
from rich.control import strip_control_codes

import ssd_jax
from ssd_jax import checkpoint, show
from ssd_jax.errors import (
    CheckpointError,
    ConfigError,
    PlanError,
    PromptError,
    SamplingError,
    VocabularyMismatchError,
)
from ssd_jax.memory import cache_bytes_per_token, weight_bytes
from ssd_jax.plan import Capacities, DraftPlan, NGramPlan, Plan
from ssd_jax.tokenizer import Tokenizer

VOCAB = 300
SMALL = Plan(
    width=6,
    drafts=(DraftPlan(rounds=2, width=2, branch=2, threshold=0.0),),
    ngram=NGramPlan(levels=2, width=3, branch=2, match=3),
    depth=4,
    nodes=16,
    chunk=8,
)


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """A trio folder of random models over a byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("trio")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x): return x + 1\n" * 40] * 4, trainer)
    size = backend.get_vocab_size()
    fields = dict(vocab_size=size, bos_token_id=0, eos_token_id=0)
    for name, seed in (("oracle", 0), ("draft", 1)):
        checkpoint.save_model(toys.model(seed, **fields), folder / name)
        backend.save(str(folder / name / "tokenizer.json"))
    toys.katz(size).save(folder / "ngram.safetensors")
    return folder


@pytest.fixture(scope="module")
def stack(trio):
    return ssd_jax.load(trio)


IMPORTS = (
    "import ssd_jax.generate",
    "from ssd_jax.generate import generate; import ssd_jax; assert generate is ssd_jax.generate",
    "import ssd_jax; ssd_jax.generate; import ssd_jax.generate",
    "import ssd_jax.benchmark.examples, ssd_jax",
)


def test_a_fresh_process_imports_little_and_finds_the_function(trio):
    """One process for what needs a fresh one: it takes seconds to start."""
    code = f"""
import sys
import ssd_jax
assert "jax" not in sys.modules
for line in {IMPORTS!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "ssd_jax"]:
        del sys.modules[name]
    exec(line)
    assert ssd_jax.generate.__name__ == "generate", line
stack = ssd_jax.load({str(trio)!r})
assert ssd_jax.generate(stack, "def f", max_new_tokens=2, mode="baseline").tokens
bad = {{"transformers", "torch", "orbax", "matplotlib"}} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_every_mode_writes_the_same(stack):
    results = {
        mode: ssd_jax.generate(stack, "def f", max_new_tokens=20, mode=mode, plan=plan)
        for mode, plan in [("baseline", None), ("speculative", None), ("staged", SMALL)]
    }
    for mode, result in results.items():
        assert result.tokens == results["baseline"].tokens
        assert result.text == stack.tokenizer.decode([t for t in result.tokens if t != 0])
        assert len(result.origins) == len(result.tokens) == result.stats.new_tokens
        assert result.stats.passes["oracle"] == result.stats.rounds
        assert result.stats.tokens_per_oracle_pass == len(result.tokens) / result.stats.rounds
        assert result.stats.seconds > 0 and result.stats.min_margin > 0
        expected = {"baseline": ["oracle"], "speculative": ["oracle", "draft"]}
        assert list(result.stats.passes) == expected.get(mode, ["oracle", "draft"])
    assert results["baseline"].stats.relative_bandwidth == pytest.approx(1.0)
    assert set(results["baseline"].origins) == {"oracle"}
    assert set(results["staged"].origins) <= {"oracle", "draft", "ngram"}


def test_relative_bandwidth_counts_bytes_by_hand(stack):
    """The chain on random models, which never agree: each round has an oracle pass and four
    draft passes over the text so far, fewer where the end of the text is nearer."""
    chain = Plan.speculative().unpaced()
    result = ssd_jax.generate(stack, [5, 6, 7], max_new_tokens=12, plan=chain)
    lengths = range(3, 15)
    passes = [min(4, 14 - n) for n in lengths]
    assert result.stats.passes == {"oracle": 12, "draft": sum(passes)}

    def read(model, n):
        return weight_bytes(model) + cache_bytes_per_token(model) * n

    plain = sum(read(stack.oracle, n) for n in lengths)
    drafts = sum(k * read(stack.drafts[0], n) for k, n in zip(passes, lengths, strict=True))
    assert result.stats.relative_bandwidth == pytest.approx((plain + drafts) / plain)
    c = stack.oracle.config
    layer = 12 * c.n_embd**2 + 13 * c.n_embd
    parameters = c.vocab_size * c.n_embd + c.n_layer * layer + 2 * c.n_embd
    assert weight_bytes(stack.oracle) == 4 * parameters
    assert cache_bytes_per_token(stack.oracle) == 4 * 2 * c.n_layer * c.n_embd


def test_text_comes_in_pieces_that_add_up(stack):
    most = 0
    for prompt, seed in [("é 漢字 def", 1), ("", 2), ("x", 3)]:
        pieces = []
        options = dict(max_new_tokens=60, temperature=1.5, seed=seed, plan=SMALL)
        result = ssd_jax.generate(stack, prompt, on_text=pieces.append, **options)
        assert "".join(pieces) == result.text
        most = max(most, len(pieces))
        assert result.tokens == ssd_jax.generate(stack, prompt, **options).tokens
    assert most > 2


def test_seeds(stack):
    options = dict(max_new_tokens=16, temperature=1.0, plan=SMALL)
    texts = [ssd_jax.generate(stack, "def", seed=seed, **options).tokens for seed in range(4)]
    again = ssd_jax.generate(stack, "def", seed=2, **options)
    assert again.tokens == texts[2]
    assert len({tuple(tokens) for tokens in texts}) == 4


def test_finish_reasons(stack):
    free = ssd_jax.generate(stack, "ab", max_new_tokens=12, plan=SMALL)
    assert free.finish_reason == "length" and len(free.tokens) == 12
    end = next(i for i in range(3, 12) if free.tokens[i] not in free.tokens[:i])
    config = dataclasses.replace(stack.oracle.config, eos_token_id=(0, free.tokens[end]))
    ending = toys.model(0, **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    short = ssd_jax.generate(
        dataclasses.replace(stack, oracle=ending), "ab", max_new_tokens=12, plan=SMALL
    )
    assert short.finish_reason == "eos" and short.tokens == free.tokens[: end + 1]
    assert short.text == stack.tokenizer.decode(free.tokens[:end])
    context = stack.oracle.config.n_positions
    full = ssd_jax.generate(stack, [3] * (context - 4), max_new_tokens=50, plan=SMALL)
    assert full.finish_reason == "context" and len(full.tokens) == 4
    none = ssd_jax.generate(stack, [3] * context, max_new_tokens=50, plan=SMALL)
    assert none.finish_reason == "context" and none.tokens == [] and none.text == ""


def test_an_empty_prompt_starts_from_the_beginning_of_text(stack):
    empty = ssd_jax.generate(stack, "", max_new_tokens=6, plan=SMALL)
    assert empty.tokens == ssd_jax.generate(stack, [0], max_new_tokens=6, plan=SMALL).tokens
    bare = toys.stack("never")
    with pytest.raises(PromptError, match="empty"):
        ssd_jax.generate(bare, [])


def test_token_prompts_of_any_kind(stack):
    expected = ssd_jax.generate(stack, [4, 5, 6], max_new_tokens=5, plan=SMALL).tokens
    for prompt in ((4, 5, 6), np.array([4, 5, 6]), jnp.array([4, 5, 6], jnp.int32)):
        assert ssd_jax.generate(stack, prompt, max_new_tokens=5, plan=SMALL).tokens == expected


def test_a_new_prompt_in_the_same_bucket_compiles_nothing(stack):
    ssd_jax.generate(stack, "def f(x):", max_new_tokens=20, plan=SMALL)
    for prompt, options in [("x", {}), ("return y", dict(temperature=0.7, top_k=5, seed=9))]:
        result = ssd_jax.generate(stack, prompt, max_new_tokens=25, plan=SMALL, **options)
        assert result.stats.compile_seconds == 0.0


def test_parts_load_one_by_one(trio, stack):
    parts = ssd_jax.load(
        oracle=trio / "oracle", drafts=[trio / "draft"], ngram=trio / "ngram.safetensors"
    )
    alone = ssd_jax.load(oracle=str(trio / "oracle"))
    assert alone.drafts == () and alone.ngram is None and alone.tokenizer is not None
    look_up = ssd_jax.generate(alone, "def f", max_new_tokens=12)  # staged: look-up alone
    for result in (ssd_jax.generate(parts, "def f", max_new_tokens=12, plan=SMALL), look_up):
        assert (
            result.tokens
            == ssd_jax.generate(stack, "def f", max_new_tokens=12, mode="baseline").tokens
        )


def test_bfloat16_stacks_decode(trio):
    half = ssd_jax.load(trio, dtype="bfloat16")
    assert half.oracle.h[0].attn.c_attn.kernel[...].dtype == jnp.bfloat16
    result = ssd_jax.generate(half, "def f", max_new_tokens=12, plan=SMALL)
    assert len(result.tokens) == 12
    assert weight_bytes(half.oracle) < 0.6 * weight_bytes(ssd_jax.load(trio).oracle)


def test_prompts_that_cannot_be_decoded(stack):
    vocab, context = stack.vocab_size, stack.oracle.config.n_positions
    for prompt, message in [
        ([vocab], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([1.5], "integers"),
        ([True], "integers"),
        (["a", 5], "text or token ids"),
        ([[1], [2.5]], "integers"),
        (7, "text or token ids"),
        ([1] * (context + 1), "shorten"),
        ("x " * 400, "shorten"),
        ("\ud800", "surrogate"),
    ]:
        with pytest.raises(PromptError, match=message):
            ssd_jax.generate(stack, prompt, plan=SMALL)
    with pytest.raises(PromptError, match="no tokenizer"):
        ssd_jax.generate(toys.stack("never"), "text")


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=0),
        dict(max_new_tokens=2.5),
        dict(temperature=-1),
        dict(top_k=-1),
        dict(top_p=0),
        dict(seed=-3),
    ],
)
def test_options_out_of_range(stack, options):
    with pytest.raises(SamplingError):
        ssd_jax.generate(stack, "x", **options)


def test_plans_the_stack_cannot_follow(stack):
    bare = dataclasses.replace(stack, drafts=(), ngram=None)
    with pytest.raises(PlanError, match="needs a draft"):
        ssd_jax.generate(bare, "x", mode="speculative")
    with pytest.raises(PlanError, match="drafts"):
        ssd_jax.generate(bare, "x", plan=SMALL)
    with pytest.raises(PlanError, match="trigram"):
        ssd_jax.generate(bare, "x", plan=dataclasses.replace(SMALL, drafts=()))
    with pytest.raises(PlanError, match="unknown mode"):
        ssd_jax.generate(stack, "x", mode="fast")


def test_stages_must_share_a_vocabulary(trio, tmp_path, stack):
    checkpoint.save_model(toys.model(2, vocab_size=VOCAB + 7), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(VocabularyMismatchError, match="draft has a vocabulary of 307"):
        ssd_jax.load(oracle=trio / "oracle", drafts=[tmp_path / "other"])
    (tmp_path / "other" / "tokenizer.json").write_bytes(
        (trio / "oracle" / "tokenizer.json").read_bytes()
    )
    with pytest.raises(VocabularyMismatchError, match="n-gram"):
        ssd_jax.load(oracle=tmp_path / "other", ngram=toys.katz(VOCAB - 1))
    checkpoint.save_model(toys.model(2, vocab_size=9), tmp_path / "few")
    (tmp_path / "few" / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(VocabularyMismatchError, match="tokenizer has"):
        ssd_jax.load(oracle=tmp_path / "few", tokenizer=trio / "oracle")
    with pytest.raises(VocabularyMismatchError, match="tokenizer"):
        ssd_jax.Stack(toys.model(0), tokenizer=stack.tokenizer)


def test_loading_what_is_not_there(trio, tmp_path):
    with pytest.raises(CheckpointError, match="not a trio folder"):
        ssd_jax.load(tmp_path)
    with pytest.raises(CheckpointError):
        ssd_jax.load(oracle=tmp_path / "nothing")
    with pytest.raises(CheckpointError):
        ssd_jax.load(oracle=trio / "oracle", ngram=tmp_path / "nothing.safetensors")
    with pytest.raises(ConfigError):
        ssd_jax.load()
    with pytest.raises(ConfigError):
        ssd_jax.load(trio, drafts=[trio / "draft"])


def test_tokenizer_of_the_oracle_is_found(trio):
    assert isinstance(ssd_jax.load(oracle=trio / "oracle").tokenizer, Tokenizer)


def test_plans_survive_json(tmp_path):
    plan = dataclasses.replace(SMALL, floor=0.25, drafts=(DraftPlan(), DraftPlan(width=3)))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    for mode in ("baseline", "speculative", "staged"):
        default = Plan.for_mode(mode, 1, True)
        assert Plan.from_json(default.to_json()) == default


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"width": 0}',
        '{"width": 2.5}',
        '{"width": true}',
        '{"depht": 3}',
        '{"drafts": {}}',
        '{"drafts": [{"rounds": -1}], "depth": 2, "nodes": 4}',
        '{"drafts": [3]}',
        '{"drafts": [{}]}',
        '{"ngram": {"match_prob": [2]}, "depth": 1, "nodes": 1}',
        '{"ngram": {"match_prob": []}, "depth": 1, "nodes": 1}',
        '{"ngram": {"branch": 0, "match": 0}, "depth": 1, "nodes": 1}',
        '{"floor": "low"}',
    ],
)
def test_damaged_plans_are_refused(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "absent.json")


def test_slots_cover_the_text_and_every_block():
    for plan in (Plan.baseline(), Plan.speculative(), Plan.staged(), Plan.staged(2), SMALL):
        capacities = Capacities.of(plan, 128)
        for model, (width, passes) in enumerate(
            zip(capacities.widths, capacities.passes, strict=True)
        ):
            scratch = capacities.slots(model) - 128
            assert scratch >= width * passes
            assert scratch >= capacities.chunk
            assert scratch >= capacities.trunk + capacities.depth + 1
        rounds = math.prod(d.rounds + 1 for d in plan.drafts[:-1]) if plan.drafts else 0
        if plan.drafts:
            assert capacities.passes[-1] == rounds * plan.drafts[-1].rounds


def test_the_coloured_text_shows_who_proposed_what(stack, tmp_path):
    prompt = "é def"
    result = ssd_jax.generate(stack, prompt, max_new_tokens=40, temperature=1.2, seed=4, plan=SMALL)
    colored = show.colored_text(stack, result, prompt)
    whole = prompt + stack.tokenizer.decode(result.tokens).rstrip("\ufffd")
    assert colored.plain == strip_control_codes(whole)  # a model may not steer the terminal
    assert not colored.style and colored.spans[0].style == "dim"
    styles = [span.style for span in colored.spans[1:]]
    assert styles == [
        show.STYLES[origin]
        for origin, piece in zip(result.origins, _pieces(stack, result.tokens), strict=True)
        if piece
    ]
    show.save_svg(tmp_path / "text.svg", stack, result, prompt)
    drawing = (tmp_path / "text.svg").read_text(encoding="utf-8")
    assert drawing.startswith("<svg") and "oracle&#160;passes" in drawing
    assert "url(http" not in drawing  # nothing is fetched to show it
    assert [path.name for path in tmp_path.iterdir()] == ["text.svg"]
    with pytest.raises(PromptError, match="no tokenizer"):
        show.colored_text(toys.stack("never"), result)


def _pieces(stack, tokens) -> list[str]:
    """The text each token adds, whole characters only."""
    pieces, shown = [], ""
    for end in range(1, len(tokens) + 1):
        whole = stack.tokenizer.decode(tokens[:end]).rstrip("\ufffd")
        pieces.append(whole[len(shown) :])
        shown = max(shown, whole, key=len)
    return pieces
