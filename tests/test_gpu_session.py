"""The script for a GPU runs as it is, on a CPU and with tiny models."""

import os
import subprocess
import sys

import pytest
from prompts import REPOSITORY

from ssd_jax.benchmark import results


@pytest.mark.slow
def test_a_dry_run_leaves_the_results_of_both_oracles(tmp_path):
    done = subprocess.run(
        [REPOSITORY / "scripts" / "gpu_session.sh", tmp_path / "gpu"],
        env=os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    small, wide = (results.read(tmp_path / "gpu" / n / "results.json") for n in ("trio", "widened"))
    assert wide["conditions"]["label"].startswith("widened from 3 x 64 to 4 x 128")
    assert small["conditions"]["dtype"] == wide["conditions"]["dtype"] == "bfloat16"
    for document in (small, wide):
        assert {record["mode"] for record in document["records"]} == set(
            ("baseline", "speculative", "staged")
        )
    assert not (tmp_path / "gpu" / "wide").exists(), "gigabytes on a GPU"
    assert "skipped" in (tmp_path / "gpu" / "tests.txt").read_text()
