"""Signals at any moment, processes beside each other: one line at most, nothing half-written."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from prompts import REPOSITORY

from ssd_jax import cli

SCRIPT = REPOSITORY / "scripts" / "decode.py"
ARGUMENTS = ("--checkpoint", "python-tiny", "--max-new-tokens", "24", "--verbose", "def f(x):\n")


def start(cache, *argv: str) -> subprocess.Popen:
    environment = os.environ | {"SSD_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(SCRIPT), *(argv or ARGUMENTS)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A shell's background job ignores SIGINT, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the command prints, and how long it takes with nothing in the cache."""
    began = time.monotonic()
    process = start(tmp_path_factory.mktemp("cache"))
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return text, time.monotonic() - began


def test_an_interrupt_in_a_callback_of_the_garbage_collector_counts(capsys):
    """Python prints an exception raised there, and goes on."""
    arrived = []

    def collecting(*_):
        if not arrived:
            arrived.append(True)
            signal.raise_signal(signal.SIGINT)

    def command() -> None:
        gc.callbacks.append(collecting)
        gc.collect()
        assert arrived
        time.sleep(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.run_command(command) == cli.EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
        gc.callbacks.remove(collecting)
    assert capsys.readouterr().err == "interrupted\n"


# Shares of a run from an empty cache: imports, loading, compiling, and on to decoding.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "share"),
    [(kind, share) for kind in (signal.SIGINT, signal.SIGTERM) for share in (0.2, 0.4, 0.6, 0.85)],
)
def test_a_signal_ends_it_and_the_next_run_is_sound(undisturbed, tmp_path, share, kind):
    text, seconds = undisturbed
    process = start(tmp_path)
    time.sleep(share * seconds)
    process.send_signal(kind)
    out, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    if kind == signal.SIGINT:
        assert process.returncode in (130, 0), errors
        assert errors.splitlines()[-1] == "interrupted" or process.returncode == 0
    else:
        assert process.returncode in (-signal.SIGTERM, 0), errors
    assert text.startswith(out)
    again = start(tmp_path)
    out, errors = again.communicate(timeout=120)
    assert (again.returncode, out) == (0, text), errors
    assert "Traceback" not in errors and "Error" not in errors


def test_processes_share_a_cache(undisturbed, tmp_path):
    """All of them compile and keep the same program at once."""
    text, _ = undisturbed
    for _ in range(2):  # the second time there is something to read
        several = [start(tmp_path) for _ in range(2)]
        for process in several:
            out, errors = process.communicate(timeout=180)
            assert (process.returncode, out) == (0, text), errors
            assert "Traceback" not in errors and "Error" not in errors


SAVING = """
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
import toys
from ssd_jax import tuned
from ssd_jax.costs import PassCosts
from ssd_jax.plan import Plan
stack = toys.stack()
costs = PassCosts({"oracle": {1: 1e-3, 8: 2e-3}}, 64)
for turn in range(200):
    tuned.save(stack, tuned.Tuned({sys.argv[2]: Plan.staged()}, {sys.argv[2]: 2.0}, costs))
    assert tuned.load(stack) is not None
"""


def test_processes_share_tuned_plans(tmp_path):
    """Both write one file again and again, and never read half of it."""
    environment = os.environ | {"SSD_JAX_CACHE": str(tmp_path)}
    argv = [sys.executable, "-c", SAVING, str(REPOSITORY / "tests")]
    both = [
        subprocess.Popen([*argv, kind], env=environment, stderr=subprocess.PIPE, text=True)
        for kind in ("greedy", "sampled")
    ]
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "plans").iterdir())) == 1, "a temporary file stayed"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 9 bytes")])
def test_want_of_memory_anywhere_is_one_line(error, capsys):
    def command() -> None:
        raise error

    assert cli.run_command(command) == cli.EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory; ")


def test_other_errors_are_no_want_of_memory():
    def command() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        cli.run_command(command)
