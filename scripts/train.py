#!/usr/bin/env python3
"""Train a matched trio: tokenizer, oracle, drafts, sampled corpus, n-gram, model card."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a bare clone
    from ssd_jax.cli import leave
    from ssd_jax.training.command import main

    leave(main())
