"""What is installed: the wheel works alone, and `ssd-jax` is what the scripts are."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssd_jax
from ssd_jax import __main__ as console
from ssd_jax import shipped
from ssd_jax.errors import CheckpointError

ROOT = Path(__file__).parents[1]


def _run(*argv, **variables: str) -> str:
    environ = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, *map(str, argv)], env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_decodes_by_the_name_of_its_trio_from_anywhere(tmp_path, monkeypatch):
    pytest.importorskip("hatchling")
    monkeypatch.chdir(ROOT)
    _run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ssd_jax/py.typed", "ssd_jax/pages/report.html.j2"} <= set(names)
    assert not any(name.startswith(("tests", "scripts", "checkpoints", "docs")) for name in names)
    target = tmp_path / "target"
    offline = ("--no-deps", "--no-index", "--no-compile", "--quiet")
    _run("-m", "pip", "install", *offline, "--target", target, wheel)
    monkeypatch.chdir(tmp_path)
    command = (target / "bin" / "ssd-jax", "decode", "--checkpoint", "python-tiny")
    options = ("--mode", "baseline", "--max-new-tokens", "3", "--json", "def f(")
    installed = json.loads(_run(*command, *options, PYTHONPATH=str(target)))
    here = ssd_jax.generate(
        ssd_jax.load("python-tiny"), "def f(", mode="baseline", max_new_tokens=3
    )
    assert installed["tokens"] == here.tokens


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path, monkeypatch):
    assert shipped.names() == ["python-small", "python-tiny"]
    with pytest.raises(CheckpointError, match="'python-smal'.*python-small, python-tiny"):
        ssd_jax.load("python-smal")
    (tmp_path / "python-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped.locate("python-tiny") == Path("python-tiny"), "a folder of that name is meant"
    monkeypatch.setattr(shipped, "_FOLDERS", (tmp_path,))
    with pytest.raises(CheckpointError, match="none in this installation"):
        shipped.locate("python-small")


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_reached_and_called_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        console.main([name, "--help"])
    assert end.value.code == 0
    assert f"ssd-jax {name}" in (out := capsys.readouterr().out)
    assert ".py " not in out.replace("HumanEval", "").replace("prompt.py", "")


def test_commands_are_listed_and_others_refused(capsys):
    with pytest.raises(SystemExit) as end:
        console.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in console.COMMANDS)
    with pytest.raises(SystemExit) as end:
        console.main(["encode"])
    assert end.value.code == 2
    assert "decode" in capsys.readouterr().err
