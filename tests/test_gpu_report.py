"""The decode loop compiled for a described GPU: kernels, copies, graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_jax import xla_flags
from ssd_jax.compiled import in_a_graph, main_loop

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 2  # compiled sooner; a layer's kernels are the same


def _report(tmp_path, *arguments):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the extra 'aot'")
    command = [sys.executable, str(ROOT / "scripts" / "gpu_report.py"), "--json"]
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--hlo", str(tmp_path), *arguments], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hlo")
    return _report(folder, "--layers", str(LAYERS)), folder


def test_a_layer_takes_few_kernels(small):
    figures, _ = small
    assert 8 <= figures["baseline.kernels_per_layer"] <= 14  # the last layer's sum has its own
    assert 8 <= figures["staged.kernels_per_layer"] <= 15


def test_no_cache_is_copied_and_each_loop_is_one_graph(small):
    figures, _ = small
    assert figures["cache_sized_copies"] == 0
    assert figures["single_graph"] is True


def test_a_sampled_round_has_few_kernels_outside_the_models(small):
    figures, _ = small
    assert 20 <= figures["staged.kernels_outside_models"] <= 60


def test_the_programs_are_written(small):
    _, folder = small
    for name in ("baseline", "staged"):
        loop = main_loop((folder / f"{name}-h200.hlo.txt").read_text())
        assert any("model0" in kernel.scope for kernel in loop.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "rtx4090"])
def test_targets_with_all_layers(tmp_path, target):
    figures = _report(tmp_path, "--target", target)
    assert figures["baseline.kernels_per_layer"] <= 13
    assert figures["staged.kernels_per_round"] <= 1.35 * figures["baseline.kernels_per_step"]
    assert figures["staged.kernels_outside_models"] <= 60
    assert figures["cache_sized_copies"] == 0
    assert figures["single_graph"] is True


HLO = """\
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%yes (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %f.1 = f32[4]{0} fusion(%p.1), kind=kLoop, calls=%fused, metadata={op_name="a/x/neg"}
}

%no (p.2: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %c.2 = f32[4]{0} copy(%p.2)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %y = f32[4]{0} conditional(%i, %x, %x), branch_computations={%yes, %no}
  %z = f32[4]{0} custom-call(%y), custom_call_target="gemm", metadata={op_name="a/model0/dot"}
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %z)
}

%condition (t.1: (s32[], f32[4])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %l = pred[] fusion(%t.1), kind=kLoop, calls=%fused
}

%before (t.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t.2 = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%t.2), index=0
  %w = f32[4]{0} get-tuple-element(%t.2), index=1
  %w.1 = f32[4]{0} copy(%w)
  %w.2 = f32[4]{0} copy(%w.1)
  %w.3 = f32[4]{0} copy(%w.2)
  %w.4 = f32[4]{0} copy(%w.3)
  %w.5 = f32[4]{0} copy(%w.4)
  ROOT %r.2 = (s32[], f32[4]{0}) tuple(%j, %w.5)
}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[], f32[4]{0}) parameter(0)
  %while.0 = (s32[], f32[4]{0}) while(%a), condition=%condition, body=%before
  ROOT %while.1 = (s32[], f32[4]{0}) while(%while.0), condition=%condition, body=%body
}
"""


def test_kernels_of_condition_body_and_both_branches_are_counted():
    """Of the last loop, though the one before it launches more."""
    loop = main_loop(HLO)
    assert loop.name == "while.1"
    assert sorted(k.name for k in loop.kernels) == ["c.2", "f.1", "l", "z"]
    assert loop.control == 1
    assert {k.name: k.scope for k in loop.kernels}["z"] == "a/model0/dot"


def test_a_program_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        main_loop("ENTRY %main (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n")


def test_the_log_tells_what_is_in_a_graph():
    log = "I x] Creating command buffer thunk with the following thunks: fusion.1, while.1, copy.2"
    assert in_a_graph(log, "while.1")
    assert not in_a_graph(log, "while")


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda: True)
    monkeypatch.setattr(xla_flags, "known", lambda: True)


def test_a_graph_is_asked_for_beside_the_users_own_flags(a_gpu):
    environ = {"XLA_FLAGS": "--xla_dump_to=there"}
    assert xla_flags.ask_for_one_graph(environ)
    assert environ["XLA_FLAGS"].split() == ["--xla_dump_to=there", *xla_flags.ONE_GRAPH]
    assert not xla_flags.ask_for_one_graph(environ), "once is enough"


@pytest.mark.parametrize(
    "environ",
    [
        {"JAX_PLATFORMS": "cpu"},
        {"SSD_JAX_CUDA_GRAPH": "0"},
        {"XLA_FLAGS": "--xla_gpu_graph_min_graph_size=5"},
        {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
    ],
)
def test_the_user_has_the_last_word_on_graphs(a_gpu, environ):
    before = dict(environ)
    assert not xla_flags.ask_for_one_graph(environ)
    assert environ == before


def test_an_unknown_xla_is_left_alone(monkeypatch):
    monkeypatch.setattr(xla_flags, "_has_gpu", lambda: True)
    monkeypatch.setattr(xla_flags.importlib.metadata, "version", lambda _: "0.99.0")
    assert not xla_flags.ask_for_one_graph({})
