"""Options: what they mean before anything is decoded, and what is refused."""

import dataclasses

import numpy as np
import pytest

from ssd_jax.errors import SamplingError
from ssd_jax.generation_config import GenerationConfig, configurations


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_new_tokens=0),
        dict(max_new_tokens=2.5),
        dict(max_new_tokens=True),
        dict(max_new_tokens="9"),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature="hot"),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(seed=-1),
        dict(seed=2**64),
        dict(do_sample="yes"),
        dict(do_sample=True, temperature=0.0),
        dict(num_return_sequences=0),
        dict(eos_token_id=-1),
        dict(eos_token_id=1.5),
        dict(eos_token_id=[1, "a"]),
        dict(eos_token_id="ab"),
        dict(stop_strings=[""]),
        dict(stop_strings=["a", ""]),
        dict(stop_strings=[5]),
        dict(stop_strings=7),
        dict(stop_token_sequences=[[]]),
        dict(stop_token_sequences=[5, 6]),
        dict(stop_token_sequences=["ab"]),
        dict(stop_token_sequences=[[1.5]]),
        dict(max_time=0),
        dict(max_time=-1.0),
        dict(max_time=float("inf")),
        dict(max_time="1"),
        dict(logprobs=-1),
        dict(logprobs=129),
        dict(logprobs=True),
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(SamplingError):
        GenerationConfig(**fields)


def test_do_sample_has_the_senses_of_transformers():
    assert not GenerationConfig().sampled
    assert GenerationConfig(temperature=0.7).sampled
    assert not GenerationConfig(temperature=0.7, do_sample=False).sampled
    assert GenerationConfig(do_sample=True).sampling_options()["temperature"] == 1.0
    given = GenerationConfig(do_sample=True, temperature=0.5, bad_words_ids=[[3]])
    options = {k: v for k, v in given.sampling_options().items() if v is not None}
    assert options == dict(temperature=0.5, seed=0, bad_words_ids=[[3]])


def test_one_of_something_is_a_list_of_one():
    assert GenerationConfig(stop_strings="ab").stop_strings == ("ab",)
    assert GenerationConfig(eos_token_id=3).eos_ids((7,)) == (3,)
    assert GenerationConfig(eos_token_id=()).eos_ids((7,)) == ()
    assert GenerationConfig().eos_ids((7,)) == (7,)
    assert GenerationConfig(stop_token_sequences=[np.array([1, 2])]).stop_token_sequences == (
        (1, 2),
    )


def test_samples_have_seeds_of_their_own():
    assert [one.seed for one in GenerationConfig(seed=np.int64(3)).samples()] == [3]
    given = GenerationConfig(temperature=1.0, seed=2**64 - 2, num_return_sequences=3)
    assert [one.seed for one in given.samples()] == [2**64 - 2, 2**64 - 1, 0]
    assert {one.num_return_sequences for one in given.samples()} == {1}
    assert {one.temperature for one in given.samples()} == {1.0}


def test_options_for_all_prompts_and_for_each():
    base = GenerationConfig(top_k=5, seed=1)
    first, second = configurations(base, dict(temperature=[0.0, 0.5], max_new_tokens=9), 2)
    assert (first.temperature, second.temperature) == (0.0, 0.5)
    assert first.max_new_tokens == second.max_new_tokens == 9 and first.top_k == second.top_k == 5
    first, second = configurations([base, GenerationConfig(seed=2)], dict(seed=(3, 4)), 2)
    assert (first.top_k, first.seed, second.top_k, second.seed) == (5, 3, None, 4)
    first, second = configurations(None, dict(stop_strings=["a", "b"], seed=np.array([5, 6])), 2)
    assert first.stop_strings == second.stop_strings == ("a", "b")  # a list in itself
    assert (first.seed, second.seed) == (5, 6)


@pytest.mark.parametrize(
    "config, overrides, message",
    [
        (None, dict(temprature=1.0), "'temperature'"),
        (None, dict(max_tokens=3), "'max_new_tokens'"),
        (None, dict(n=2), "'num_return_sequences'"),
        (None, dict(stop="x"), "'stop_strings'"),
        (None, dict(qqqq=1), "known: max_new_tokens"),
        (None, dict(seed=[1, 2, 3]), "3 entries for 2 prompts"),
        (None, dict(temperature=[0.5]), "1 entries for 2 prompts"),
        ([GenerationConfig()], {}, "1 entries for 2 prompts"),
        ({"seed": 1}, {}, "must be a GenerationConfig"),
        ([GenerationConfig(), None], {}, "must be a GenerationConfig"),
        ("greedy", {}, "entries for 2 prompts"),
    ],
)
def test_options_that_do_not_fit(config, overrides, message):
    with pytest.raises(SamplingError, match=message):
        configurations(config, overrides, 2)


def test_names_are_those_of_transformers_where_it_has_them():
    transformers = pytest.importorskip("transformers")
    theirs = set(vars(transformers.GenerationConfig()))
    ours = {field.name for field in dataclasses.fields(GenerationConfig)}
    # What transformers has no option for, or one of another sense: a bias of single tokens, the
    # penalties of OpenAI's interface, token sequences that stop, seeds, the number of alternatives.
    own = {"logit_bias", "presence_penalty", "frequency_penalty", "stop_token_sequences"}
    assert ours - theirs == own | {"seed", "logprobs"}
