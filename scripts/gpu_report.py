#!/usr/bin/env python3
"""What the decode loop becomes on a GPU that need not be there; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.cli import leave
    from ssd_jax.gpu_report import main

    leave(main())
