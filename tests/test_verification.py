"""The check of losslessness: finds nothing where there is nothing, and everything there is."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax import checkpoint, decode_command, verification
from ssd_jax.errors import PromptError, SamplingError
from ssd_jax.plan import DraftPlan, Plan
from ssd_jax.verification import verify_lossless

PROMPTS = [[1, 2, 3], [7] * 9, [5, 8, 5, 8, 5]]
PLAN = {"chain": Plan(width=4, drafts=(DraftPlan(rounds=3, branch=1),), depth=4, nodes=8)}


@pytest.fixture(scope="module")
def stack():
    return toys.stack("between", ngram=False)


def test_a_lossless_stack_is_found_so(stack):
    found = verify_lossless(stack, PROMPTS, plans=PLAN, max_new_tokens=24, samples=400)
    assert found.lossless
    assert found.identical == {"greedy": {"chain": 3}, "sampled": {"chain": 3}}
    assert found.tokens == 3 * 24
    assert not any(found.divergences.values())
    (distribution,) = found.distributions
    assert distribution.samples == 400 and 1e-4 < distribution.p_value <= 1
    assert "3 of 3 texts identical" in str(found) and str(found).count("NOT") == 0
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["lossless"]


@pytest.fixture
def lying(stack, monkeypatch):
    """Speculation that replaces its sixth token by ``other``."""

    def lie(other):
        true = verification.generate_batch

        def generate_batch(stack, prompts, count, sampling, plan, capacity):
            results = true(stack, prompts, count, sampling, plan, capacity)
            if plan != Plan.baseline():
                results[0].tokens[5] = other
            return results

        monkeypatch.setattr(verification, "generate_batch", generate_batch)

    return lie


def test_a_wrong_token_is_found_and_described(stack, lying):
    lying(52)
    found = verify_lossless(stack, PROMPTS[:1], plans=PLAN, max_new_tokens=12, samples=0)
    assert not found.lossless
    assert found.identical["greedy"] == {"chain": 0}
    (one,) = found.divergences["greedy"]
    text = PROMPTS[0] + ssd_jax.generate(stack, PROMPTS[0], max_new_tokens=12).tokens
    logits = np.asarray(stack.oracle(np.array([text[:8]]))[0])[0, -1]
    assert (one.prompt, one.plan, one.position, one.tokens) == (0, "chain", 5, (text[8], 52))
    np.testing.assert_allclose(one.logits, logits[[text[8], 52]], atol=1e-4)
    np.testing.assert_allclose(one.margin, logits[text[8]] - logits[52], atol=1e-4)
    assert 0 < one.rounding < 1e-3 and not one.near_tie
    assert "NOT explained by rounding" in str(found) and str(found).endswith(" s)")
    assert "NOT lossless" in str(found)


@pytest.fixture(scope="module")
def twins():
    """A stack in which two tokens have one embedding, but for a last bit, and so about one logit:
    the stack, and the second twin of any token."""

    def make(token):
        oracle = toys.model(0)
        table = oracle.wte[...]
        other = (token + 26) % toys.VOCAB
        oracle.wte[...] = table.at[other].set(table[token] * np.float32(1 - 1e-6))
        return toys.Stack(oracle), other

    return make


def parted(stack, prompt, plain, other, **options):
    options = {"temperature": 0.0, "seed": 3} | options
    return verification._divergence(stack, 0, "chain", prompt, plain, other, options)


def test_a_near_tie_is_told_from_a_mistake(twins):
    stack, other = twins(11)
    prompt, plain = PROMPTS[0], [4, 9, 11, 30]
    tie = parted(stack, prompt, plain, [4, 9, other, 30])
    assert tie.position == 2 and tie.tokens == (11, other)
    assert tie.near_tie and tie.margin < 1e-5 and "a near tie" in str(tie)
    mistake = parted(stack, prompt, plain, [4, 9, 12, 30])
    assert not mistake.near_tie and mistake.margin > 0.01
    short = parted(stack, prompt, plain, [4, 9])
    assert short.tokens == (11, None) and not short.near_tie and "ended" in str(short)


def test_a_token_at_the_end_of_top_k_may_be_in_or_out(twins):
    prompt = PROMPTS[0]
    order = np.argsort(-np.asarray(toys.model(0)(np.array([[*prompt, 4]]))[0])[0, -1]).tolist()
    stack, other = twins(order[2])
    logits = np.asarray(stack.oracle(np.array([[*prompt, 4]]))[0])[0, -1]
    order = np.argsort(-logits, kind="stable").tolist()
    rank = sorted((order.index(other), order.index((other - 26) % toys.VOCAB)))
    assert rank[1] == rank[0] + 1
    options = dict(temperature=1.0, top_k=rank[1])
    first, last = order[rank[0]], order[rank[1]]
    best = next(token for token in order[:3] if token not in (first, last))
    assert parted(stack, prompt, [4, best], [4, last], **options).near_tie
    far = next(token for token in order[20:] if token not in (first, last))
    assert not parted(stack, prompt, [4, best], [4, far], **options).near_tie


def test_an_exact_oracle_has_no_excuse(stack):
    tie = verification.Divergence(
        prompt=0,
        plan="chain",
        position=0,
        tokens=(1, 2),
        logits=(1.0, 1.0),
        margin=0.0,
        rounding=1.0,
    )
    found = verify_lossless(stack, PROMPTS[:1], plans=PLAN, max_new_tokens=2, sampled={})
    parting = dataclasses.replace(found, divergences={"greedy": [tie]})
    assert parting.lossless and not dataclasses.replace(parting, exact=True).lossless


def test_samples_of_another_distribution_do_not_fit(stack, monkeypatch):
    true = verification.generate

    def colder(stack, prompt, **options):
        return true(stack, prompt, **options | {"temperature": 0.6})

    monkeypatch.setattr(verification, "generate", colder)
    found = verify_lossless(stack, PROMPTS[:1], plans=PLAN, max_new_tokens=4, samples=400)
    assert found.identical["sampled"] == {"chain": 1}
    assert not found.distributions[0].fits and not found.lossless
    assert "DOES NOT FIT" in str(found)


def test_default_plans_fit_the_stack():
    for drafts, ngram in ((0, False), (1, True), (2, False)):
        stack = toys.stack("always", drafts=drafts, ngram=ngram)
        plans = verification.verification_plans(stack)
        assert len(plans) == (3 if drafts else 2)
        for plan in plans.values():
            plan.check_stack(drafts, ngram)


def test_what_cannot_be_verified_is_refused(stack):
    with pytest.raises(PromptError, match="no prompt"):
        verify_lossless(stack, [])
    with pytest.raises(SamplingError, match="repetition_penalty"):
        verify_lossless(stack, PROMPTS, sampled={"temperature": 1.0, "repetition_penalty": 2.0})
    with pytest.raises(SamplingError, match="temperature"):
        verify_lossless(stack, PROMPTS, sampled={"top_k": 5})


def test_the_command_says_it_by_its_status(stack, tmp_path, capsys, monkeypatch):
    checkpoint.save_model(stack.oracle, tmp_path / "oracle")
    checkpoint.save_model(stack.drafts[0], tmp_path / "draft")
    monkeypatch.setattr(verification, "verification_plans", lambda stack: PLAN)
    argv = ["--checkpoint", str(tmp_path), "--verify", "--prompt-tokens", "1,2,3"]
    argv += ["--max-new-tokens", "8"]
    assert decode_command.main(argv) == 0
    assert "1 of 1 texts identical" in capsys.readouterr().out
    monkeypatch.setattr(
        verification,
        "_distribution",
        lambda *_: verification.Distribution(
            prompt=0, samples=1, statistic=99.0, freedom=1, p_value=0.0
        ),
    )
    assert decode_command.main([*argv, "--json", "--temperature", "0.5"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["identical"]["sampled"] == {"chain": 1} and not document["lossless"]
    for wrong in (["--compare"], ["--prompts", "x.jsonl"], ["--n", "2"]):
        with pytest.raises(SystemExit):
            decode_command.main([*argv, *wrong])
    assert jnp.isfinite(stack.oracle.wte[...]).all()
