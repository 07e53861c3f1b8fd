"""The shipped trio: lossless, equal to ``transformers``, and worth its drafts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompts import TRIO, heldout, humaneval

import ssd_jax
from ssd_jax.gpt2 import parameter_count
from ssd_jax.plan import DraftPlan, NGramPlan, Plan

pytestmark = pytest.mark.skipif(not TRIO.is_dir(), reason=f"{TRIO.name} is not shipped here")

SAMPLINGS = {
    "greedy": {},
    "top_k": dict(temperature=1.0, top_k=50),
    "top_p": dict(temperature=0.8, top_p=0.95),
}
PLANS = {
    "default": None,
    "chain": Plan.speculative(),
    "wide": Plan(
        width=16,
        drafts=(DraftPlan(rounds=2, width=4, branch=8),),
        ngram=NGramPlan(levels=4, width=4, branch=1),
        depth=10,
        nodes=64,
    ),
}
NEAR_TIE = 1e-4


@pytest.fixture
def optimized():
    """For a test that runs for longer than it compiles."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def stack():
    return ssd_jax.load(TRIO)


def one_by_one(stack, prompts, tokens: int, sampling=SAMPLINGS["greedy"], **how) -> list:
    """Each prompt alone, with its index as the seed, and one program for them all."""
    config = ssd_jax.GenerationConfig(max_new_tokens=tokens, **sampling)
    configs = [dataclasses.replace(config, seed=index) for index in range(len(prompts))]
    return ssd_jax.generate(stack, prompts, configs, batch_size=1, **how)


def assert_lossless(stack, prompts, tokens: int, samplings=SAMPLINGS, plans=PLANS) -> None:
    """Every plan writes the baseline's tokens."""
    for name, sampling in samplings.items():
        expected = one_by_one(stack, prompts, tokens, sampling, mode="baseline")
        assert all(plain.tokens for plain in expected)
        for plan_name, plan in plans.items():
            found = one_by_one(stack, prompts, tokens, sampling, plan=plan)
            for index, (got, plain) in enumerate(zip(found, expected, strict=True)):
                assert got.tokens == plain.tokens, (
                    f"{name}, {plan_name}, prompt {index}: first difference at "
                    f"{_first_difference(got.tokens, plain.tokens)}; smallest margin of the "
                    f"text {plain.stats.min_margin:.2e} (near-tie below {NEAR_TIE})"
                )


def _first_difference(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def test_a_few_prompts_are_lossless(stack):
    assert_lossless(stack, heldout(1) + humaneval(1), 40)


def test_the_tiny_trio_is_lossless_and_really_tiny():
    folder = TRIO.parent / "python-tiny"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1e6
    tiny = ssd_jax.load(folder)
    few = {name: SAMPLINGS[name] for name in ("greedy", "top_k")}
    assert_lossless(tiny, heldout(6), 40, few, {"default": None})
    plan = ssd_jax.Plan.staged().unpaced()
    staged = [result.stats for result in one_by_one(tiny, heldout(6), 40, plan=plan)]
    assert sum(s.new_tokens for s in staged) > 2 * sum(s.passes["oracle"] for s in staged)


@pytest.mark.slow
def test_many_prompts_are_lossless(stack):
    prompts = heldout(12) + humaneval(12)
    assert_lossless(stack, prompts, 96)


def test_seeds_give_different_texts(stack):
    prompt = heldout(1)[0]
    texts = {
        ssd_jax.generate(stack, prompt, max_new_tokens=48, temperature=1.0, top_k=50, seed=s).text
        for s in range(4)
    }
    assert len(texts) == 4


def test_drafts_are_small_and_of_the_same_family(stack):
    oracle, (draft,) = stack.oracle, stack.drafts
    assert 10e6 <= parameter_count(oracle) <= 23e6
    assert parameter_count(draft) * 10 <= parameter_count(oracle)
    assert 1280 % oracle.config.n_embd == 0
    assert draft.config.n_layer <= oracle.config.n_layer // 2


def test_staged_commits_four_tokens_a_pass_and_a_chain_two_and_a_half(stack):
    rates = {}
    # A CPU's default plan gives up passes for time.
    for mode, plan in (("speculative", None), ("staged", Plan.staged(1))):
        results = one_by_one(stack, heldout(8), 96, mode=mode, plan=plan)
        tokens = sum(r.stats.new_tokens for r in results)
        rates[mode] = tokens / sum(r.stats.passes["oracle"] for r in results)
    assert rates["staged"] >= 4.0
    assert rates["speculative"] >= 2.5


def test_baseline_writes_what_transformers_writes(optimized, stack):
    """20 prompts, 96 tokens, float32, greedy."""
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    reference = GPT2LMHeadModel.from_pretrained(TRIO / "oracle", dtype=torch.float32).eval()
    prompts = (heldout(10) + humaneval(10))[:20]
    assert len(prompts) >= 10
    for prompt, ours in zip(prompts, one_by_one(stack, prompts, 96, mode="baseline"), strict=True):
        ids = torch.tensor([stack.tokenizer.encode(prompt)])
        room = stack.oracle.config.n_positions - ids.shape[1]
        with torch.no_grad():
            theirs = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(96, room),
                do_sample=False,
                pad_token_id=stack.eos_ids[0],
            )
        expected = theirs[0, ids.shape[1] :].tolist()
        if ours.tokens != expected:
            where = _first_difference(ours.tokens, expected)
            with torch.no_grad():
                logits = reference(theirs[:, : ids.shape[1] + where]).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < NEAR_TIE, f"differs at {where}, margin {best - second:.2e}"


def test_shipped_weights_are_finite_and_stay_small():
    sizes = [path.stat().st_size for path in TRIO.parent.rglob("*") if path.is_file()]
    assert max(sizes) < 16e6 and sum(sizes) < 50e6
    stack = ssd_jax.load(TRIO)
    assert np.isfinite(np.asarray(stack.oracle.wte[...].astype(jnp.float32))).all()
    assert dataclasses.is_dataclass(stack)
