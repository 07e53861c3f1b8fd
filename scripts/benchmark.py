#!/usr/bin/env python3
"""Measure the decoding modes over a file of prompts; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.benchmark.command import main
    from ssd_jax.cli import leave

    leave(main())
