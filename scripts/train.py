"""Train a matched trio: tokenizer, oracle, drafts, sampled corpus, n-gram, model card."""

import sys

from ssd_jax.training import command

if __name__ == "__main__":
    sys.exit(command.main())
