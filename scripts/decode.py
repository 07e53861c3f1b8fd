#!/usr/bin/env python3
"""Continue a prompt by staged speculative decoding; see --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.cli import leave
    from ssd_jax.decode_command import main

    leave(main())
