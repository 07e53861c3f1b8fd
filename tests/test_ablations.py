"""The ablations: which variants there are, how they are run, and what the rows hold."""

from dataclasses import replace

import pytest
import toys
from test_cli import make_result

from ssd_jax.benchmark import ablations, measure, schemes
from ssd_jax.benchmark.ablations import BASELINE, Variant
from ssd_jax.plan import Plan
from ssd_jax.stack import Stack

SAMPLINGS = {"greedy": {}, "topk20": {"temperature": 1.0, "top_k": 20}}
QUIET = {"say": lambda line: None}


def named(stack):
    return {(v.group, v.name): v.how for v in ablations.variants(stack)}


@pytest.mark.parametrize(("drafts", "ngram"), [(0, False), (0, True), (1, False), (2, True)])
def test_variants_ask_only_for_what_the_stack_has(drafts, ngram):
    stack = toys.stack(drafts=drafts, ngram=ngram)
    found = ablations.variants(stack)
    assert len(named(stack)) == len(found), "group and name tell variants apart"
    plans = [v.how for v in found if isinstance(v.how, Plan)]
    assert max(len(plan.drafts) for plan in plans) == drafts
    assert ngram == any(plan.ngram is not None and plan.ngram.branch > 0 for plan in plans)
    missing = {v.group for v in found if isinstance(v.how, str)}
    assert ("drafts" in missing) == (drafts < 2)
    assert ("n-gram stage" in missing) == (not ngram)


def test_each_part_is_switched_off_alone():
    default, found = Plan.staged().unpaced(), named(toys.stack())
    assert found["n-gram stage", "trigram and look-up"] == default
    assert found["n-gram stage", "none"] == replace(default, ngram=None)
    assert found["n-gram stage", "trigram"].ngram == replace(default.ngram, match=0)
    assert found["n-gram stage", "look-up in the text"].ngram == replace(default.ngram, branch=0)
    assert found["n-gram stage", "all, no draft"].drafts == ()
    assert found["drafts", "two"] == "of model drafts the stack has 1"
    assert [v.how.width for v in found_group(toys.stack(), "oracle's width")] == [*ablations.WIDTHS]
    assert len(named(toys.stack(drafts=2))["drafts", "the first"].drafts) == 1


def found_group(stack, group):
    return [v for v in ablations.variants(stack) if v.group == group]


def test_a_table_on_a_toy_stack():
    """Engine and reference agree on the text; every figure is there, or known to be missing."""
    stack = toys.stack("between")
    wanted = {("staging", "staged draft"), ("drafts", "two")}
    only = [v for v in ablations.variants(stack) if (v.group, v.name) in wanted]
    only += [v for v in ablations.variants(stack) if isinstance(v.how, schemes.Scheme)]
    rows = ablations.ablate(
        stack, [[3, 1, 4], [1, 5]], max_new_tokens=12, samplings=SAMPLINGS, only=only, **QUIET
    )
    assert [row["sampling"] for row in rows] == ["greedy"] * 6 + ["topk20"] * 6 + [None]
    plain = [row for row in rows if row["variant"] == "plain decoding"]
    for row in plain:
        assert row["tokens per oracle pass"] == row["relative bandwidth"] == row["speed"] == 1
        assert row["draft passes per oracle pass"] == 0
    for row in rows[:-1]:
        assert row["identical"] == "2 of 2"
        assert (row["speed"] is None) == ("reference" in row["group"])
        assert row in plain or row["tokens per oracle pass"] > 1
    assert rows[-1]["variant"] == "two: of model drafts the stack has 1"
    table = ablations.markdown(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert table[2].startswith("| shape | plain decoding | greedy | 1.00 | 1.00 | 0.00 | 1.00 |")
    assert table[-1].endswith("| - | - | - | - | - | - |")


@pytest.fixture
def calls(monkeypatch):
    """Records what is generated; the first run of each plan compiles. The clock is theirs."""
    calls, now = [], [0.0]

    def generate(stack, prompt, *, plan, seed, **options):
        compiles = plan not in [call[1] for call in calls]
        calls.append((prompt, plan, options.get("temperature", 0.0), seed))
        now[0] += 50.0 if compiles else 2.0 if plan == BASELINE.how else 1.0
        return make_result(compile_seconds=3.0 * compiles)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ablations, "generate", generate)
    return calls


def test_a_run_that_compiled_is_repeated_and_variants_take_turns(calls):
    other = Plan.speculative(2)
    only = [Variant("a", "x", other), Variant("b", "the same", other)]
    rows = ablations.ablate(
        toys.stack(),
        [[1], [2]],
        max_new_tokens=4,
        samplings=SAMPLINGS,
        seed=7,
        only=only,
        **QUIET,
    )
    base = BASELINE.how
    order = [base, base, other, other] + [base, other] * 3  # two compiled; none ran for "b"
    assert [plan for _, plan, *_ in calls] == order
    assert {(prompt[0], seed) for prompt, *_, seed in calls} == {(1, 7), (2, 8)}
    assert [row["speed"] for row in rows] == [1, 2, 2] * 2
    assert rows[1] == rows[2] | {"group": "a", "variant": "x"}


def test_texts_that_differ_are_counted(monkeypatch):
    def generate(stack, prompt, *, plan, **options):
        altered = plan != BASELINE.how and prompt == [2]
        return make_result(tokens=[9] if altered else [1])

    monkeypatch.setattr(ablations, "generate", generate)
    rows = ablations.ablate(
        Stack(toys.model()),
        [[1], [2]],
        max_new_tokens=1,
        samplings={"greedy": {}},
        only=[Variant("", "wrong", Plan.speculative())],
        **QUIET,
    )
    assert [row["identical"] for row in rows] == ["2 of 2", "1 of 2"]
