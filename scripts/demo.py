#!/usr/bin/env python3
"""Decode one prompt with the shipped models in all three modes (`make demo`).

Arguments are handed on to decode.py: `scripts/demo.py --temperature 1 --top-k 50`.
"""

import sys
from pathlib import Path

PROMPT = '''\
def read_config(path, default=None):
    """Read a configuration file and return a dictionary of its sections."""
'''

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.cli import leave
    from ssd_jax.decode_command import main

    leave(main(["--compare", *sys.argv[1:], PROMPT]))
