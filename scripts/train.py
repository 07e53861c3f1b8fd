"""Train a matched trio: tokenizer, oracle, draft, sampled corpus, n-gram, model card."""

import argparse
import sys
from pathlib import Path

from ssd_jax.errors import SsdError
from ssd_jax.training import config, steps

STEPS = ("tokenizer", "oracle", "draft", "sample", "ngram", "report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--config", default="configs/python-small.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, e.g. --set train_oracle.steps=2000",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, help="default: runs/<name of the config>")
    parser.add_argument("--out", type=Path, help="default: checkpoints/<name of the config>")
    args = parser.parse_args()
    try:
        settings = config.load(args.config, args.overrides)
        work = args.workdir or Path("runs") / settings.name
        out = args.out or Path("checkpoints") / settings.name
        pipeline = steps.Pipeline(settings, work, out, lambda line: print(line, flush=True))
        for step in STEPS if args.step == "all" else (args.step,):
            getattr(pipeline, step)()
    except SsdError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
