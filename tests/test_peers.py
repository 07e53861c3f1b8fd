"""Other engines on our weights: the same texts, limits and options, and clear errors."""

import sys
from collections import Counter

import numpy as np
import pytest
import toys

import ssd_jax
from ssd_jax import checkpoint
from ssd_jax.benchmark import peers
from ssd_jax.errors import CheckpointError, DataError
from ssd_jax.stack import Stack

PROMPTS = [[7, 11, 3], [1, 2, 3, 4, 1, 2, 3, 4, 1], [40]]
NEAR_TIE = 1e-4
NEW = 40
CONTEXT = 96
EOS = 27
# Unlike the usual one, so that an engine that takes the usual one writes another text.
FIELDS = dict(layer_norm_epsilon=0.5)
# Settings of one dtype, and of as few kinds as will do: compiling takes long.
QUICK = {
    "hf": "eager, float32",
    "hf-assisted": "heuristic from 5, float32",
    "hf-lookup": "5 tokens, float32",
    "ctranslate2": "float32, 1 thread",
}


def trio(folder, **fields) -> tuple[Stack, dict]:
    """A stack of toys, and the arguments by which peers open it."""
    oracle = toys.model(0, **FIELDS, **fields)
    draft = toys.blend(oracle, 0.05)
    checkpoint.save_model(oracle, folder / "oracle")
    checkpoint.save_model(draft, folder / "draft")
    arguments = dict(oracle=folder / "oracle", draft=folder / "draft", scratch=folder)
    return Stack(oracle, (draft,)), arguments


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return trio(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    return trio(tmp_path_factory.mktemp("ending"), eos_token_id=EOS)


def open_quick(name: str, arguments: dict, **options) -> peers.Peer:
    """The peer in its setting of :data:`QUICK`, or not at all where it is not installed."""
    pytest.importorskip("transformers")
    if name == "ctranslate2":
        pytest.importorskip("ctranslate2")
    options = dict(calibration=PROMPTS[:1], max_new_tokens=4, dtypes=["float32"]) | options
    with pytest.MonkeyPatch.context() as patch:
        original = peers._fastest

        def only_quick(name, settings, jobs, say):
            return original(name, {QUICK[name]: settings[QUICK[name]]}, jobs, say)

        patch.setattr(peers, "_fastest", only_quick)
        return peers.open_peer(name, **arguments, say=lambda line: None, **options)


@pytest.fixture(scope="module", params=peers.PEERS)
def opened(request, endless):
    return open_quick(request.param, endless[1])


def greedy(peer: peers.Peer, prompt, new=NEW) -> peers.PeerRun:
    return peer.generate(prompt, max_new_tokens=new, temperature=0.0, top_k=None, seed=0)


def assert_same(stack: Stack, prompt, tokens, new=NEW) -> None:
    ours = ssd_jax.generate(stack, prompt, max_new_tokens=new, mode="baseline")
    assert tokens == ours.tokens or ours.stats.min_margin < NEAR_TIE


# ---------------------------------------------------------------------------------- texts


def test_greedy_texts_are_ours(opened, endless):
    for prompt in PROMPTS:
        run = greedy(opened, prompt)
        assert len(run.tokens) == NEW and run.seconds > 0
        assert_same(endless[0], prompt, run.tokens)


def test_the_texts_tell_layer_norm_epsilons_apart(endless):
    usual = Stack(toys.model(0))
    tokens = ssd_jax.generate(usual, PROMPTS[0], max_new_tokens=NEW, mode="baseline").tokens
    ours = ssd_jax.generate(endless[0], PROMPTS[0], max_new_tokens=NEW, mode="baseline").tokens
    assert tokens != ours


def test_texts_end_at_the_context(opened, endless):
    prompt = [(7 * i) % 50 for i in range(CONTEXT - 5)]
    run = greedy(opened, prompt)
    assert len(run.tokens) == 5
    assert_same(endless[0], prompt, run.tokens)
    assert greedy(opened, prompt + run.tokens) == peers.PeerRun([], 0.0, 0)


@pytest.mark.parametrize("name", peers.PEERS)
def test_texts_end_with_the_end_of_text_token(name, ending):
    stack, arguments = ending
    peer = open_quick(name, arguments)
    ended = 0
    for prompt in PROMPTS:
        tokens = greedy(peer, prompt, 80).tokens
        assert_same(stack, prompt, tokens, 80)
        assert EOS not in tokens[:-1]
        ended += tokens[-1] == EOS
    assert ended, "no text reaches the end-of-text token: choose another"


def test_one_token_can_be_asked_for(opened, endless):
    run = greedy(opened, PROMPTS[0], 1)
    assert len(run.tokens) == 1
    assert_same(endless[0], PROMPTS[0], run.tokens, 1)


# ------------------------------------------------------------------------------- sampling


def sample(peer, seed, top_k, temperature=1.0, new=NEW):
    options = dict(max_new_tokens=new, temperature=temperature, top_k=top_k)
    return peer.generate(PROMPTS[0], seed=seed, **options).tokens


def test_seeds_reproduce_and_vary_samples(opened):
    texts = [sample(opened, seed, 20) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def ranks(model, prompt, tokens) -> np.ndarray:
    """``[T]``, how many tokens our oracle clearly prefers to each of ``tokens``."""
    logits = np.asarray(model(np.asarray([prompt + tokens]))[0])[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(tokens)[:, None], axis=-1)
    return (logits > chosen + NEAR_TIE).sum(axis=-1)


def test_samples_are_among_the_top_k(opened, endless):
    for seed in range(4):
        found = ranks(endless[0].oracle, PROMPTS[0], sample(opened, seed, 3))
        assert 0 < found.max() < 3


def test_the_top_one_is_greedy_and_no_top_k_is_all(opened, endless):
    assert sample(opened, 3, 1) == greedy(opened, PROMPTS[0]).tokens
    # So hot that tokens are nearly uniform: those beyond transformers' default of 50 occur too.
    tokens = [sample(opened, seed, None, 1e3, 80) for seed in range(2)]
    assert max(ranks(endless[0].oracle, PROMPTS[0], text).max() for text in tokens) >= 50


# --------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name.startswith("hf")])
def test_oracle_passes_are_those_of_the_oracle(name, endless):
    torch = pytest.importorskip("torch")
    peer = open_quick(name, endless[1])
    layers: Counter[int] = Counter()

    def count(module, *_):
        if type(module).__name__ == "GPT2LMHeadModel":
            layers[id(module)] += 1

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        run = greedy(peer, PROMPTS[1])
    finally:
        hook.remove()
    assert run.oracle_passes in layers.values()
    if name == "hf":
        assert run.oracle_passes == NEW
    else:
        assert NEW / 11 <= run.oracle_passes < NEW
    assert len(layers) == 1 + (name == "hf-assisted")


# --------------------------------------------------------------------- settings and errors


def test_a_setting_that_fails_is_skipped_with_its_reason(endless, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    lines = []
    peer = peers.open_peer(
        "hf",
        **endless[1],
        calibration=PROMPTS,
        max_new_tokens=8,
        dtypes=["float32"],
        say=lines.append,
    )
    assert peer.setting == "eager, float32"
    assert peer.skipped == {"compiled, static cache, float32": "RuntimeError: no C++ compiler"}
    assert any("skipped" in line for line in lines) and any("tokens/s" in line for line in lines)


def test_the_fastest_setting_is_chosen():
    def setting(seconds):
        return lambda: lambda job: peers.PeerRun([0] * job.new, seconds, None)

    def breaks_later():
        runs = iter([peers.PeerRun([0], 1e-9, None)])
        return lambda job: next(runs)

    settings = {"slow": setting(2.0), "fast": setting(1.0), "broken": breaks_later}
    jobs = [peers._Job([1], 10)] * 2
    best, decode, skipped = peers._fastest("hf", settings, jobs, lambda line: None)
    assert best == "fast" and decode(jobs[0]).seconds == 1.0
    assert list(skipped) == ["broken"]
    with pytest.raises(DataError, match="works in no setting .*StopIteration.*leave hf out"):
        peers._fastest("hf", {"broken": breaks_later}, jobs, lambda line: None)


@pytest.mark.parametrize("name", ["hf", "hf-assisted"])
def test_every_setting_works_in_float32_and_bfloat16(name, endless, monkeypatch):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    # Graphs are captured as ever, but run without being compiled.
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, _=torch.compile, **__: _(call, backend="eager", dynamic=False),
    )
    lines = []
    options = dict(calibration=PROMPTS[:1], max_new_tokens=8, say=lines.append)
    peer = peers.open_peer(name, **endless[1], **options)
    ways = len(peers._SCHEDULES) if name == "hf-assisted" else 2
    assert not peer.skipped and len(lines) == 2 * ways


def test_compiled_decoding_writes_the_same_text_whatever_its_length(endless, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, _=torch.compile, **__: _(call, backend="eager", dynamic=False),
    )
    monkeypatch.setattr(peers, "_CACHE_STEP", 32)
    stack, arguments = endless
    oracle = transformers.GPT2LMHeadModel.from_pretrained(arguments["oracle"]).eval()
    decode = peers._Generate(torch, transformers, oracle, None, [], compiled=True)
    for new in (8, 40, 80):
        graphs = decode._graphs()
        run = decode(peers._Job(PROMPTS[0], new))
        assert decode._graphs() > graphs
        assert run.oracle_passes == new
        assert_same(stack, PROMPTS[0], run.tokens, new)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch's own compiler
def test_every_setting_of_hf_works_with_the_real_compiler(endless):
    pytest.importorskip("transformers")
    lines = []
    peer = peers.open_peer(
        "hf", **endless[1], calibration=PROMPTS[:1], max_new_tokens=8, say=lines.append
    )
    assert not peer.skipped, peer.skipped
    assert len(lines) == 4


@pytest.mark.parametrize(
    "name, missing",
    [(name, "transformers") for name in peers.PEERS] + [("ctranslate2", "ctranslate2")],
)
def test_a_missing_package_is_named_with_its_remedy(name, missing, endless, monkeypatch):
    for module in ("torch", "transformers", "ctranslate2"):
        monkeypatch.setitem(sys.modules, module, None if module == missing else sys)
    with pytest.raises(DataError, match=rf"needs? {missing} .*pip install '\.\[peers\]'"):
        peers.open_peer(name, **endless[1], calibration=PROMPTS, max_new_tokens=4)


def test_arguments_that_make_no_sense(endless, tmp_path):
    arguments = endless[1] | dict(calibration=PROMPTS, max_new_tokens=4)
    with pytest.raises(DataError, match="unknown peer 'vllm'; choose of hf, "):
        peers.open_peer("vllm", **arguments)
    with pytest.raises(DataError, match="needs a draft"):
        peers.open_peer("hf-assisted", **arguments | {"draft": None})
    checkpoint.save_model(toys.model(1, n_positions=CONTEXT // 2), tmp_path)
    with pytest.raises(DataError, match="vocabulary and context"):
        peers.open_peer("hf-assisted", **arguments | {"draft": tmp_path})
    with pytest.raises(DataError, match="no prompt to be calibrated on"):
        peers.open_peer("hf", **arguments | {"calibration": [[1] * CONTEXT]})
    with pytest.raises(CheckpointError, match="no such folder"):
        peers.open_peer("hf", **arguments | {"oracle": tmp_path / "gpt2"})


def test_ctranslate2_refuses_models_it_would_change(tmp_path):
    pytest.importorskip("ctranslate2")
    _, arguments = trio(tmp_path, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(DataError, match="scale_attn_by_inverse_layer_idx"):
        open_quick("ctranslate2", arguments)


def test_importing_peers_imports_none_of_them():
    import subprocess

    code = (
        "import sys, ssd_jax.benchmark.peers\n"
        "bad = {'torch', 'transformers', 'ctranslate2'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
