#!/usr/bin/env python3
"""Find the fastest plans for this device and these models; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.cli import leave
    from ssd_jax.tuning.command import main

    leave(main())
