"""The command line of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ssd_jax import cli

STEPS = {
    "tokenizer": "gather and split the text, learn the tokenizer, encode both splits",
    "oracle": "train the oracle",
    "generated": "draw text from the oracle for the drafts to learn from, if the config says so",
    "draft": "train the draft on the data and the oracle's distribution",
    "draft2": "train the second, smaller draft, if the config has one",
    "sample": "draw the n-gram's text from the draft",
    "ngram": "count the Katz trigram",
    "report": "assemble the trio in --out, measure it on held-out text, write its model card",
}


def build_parser(prog: str = "train.py") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="From a folder of text to an oracle, a distilled draft and a Katz trigram. "
        "Each step reads what the earlier ones left in the work folder, resumes if it was "
        "interrupted, and can be run alone.",
        epilog="examples:\n"
        f"  {prog} all --config configs/python-small.toml\n"
        f"  {prog} oracle --set train_oracle.steps=20000\n"
        f"  {prog} widen --model checkpoints/python-small/oracle --width 1280 --layers 36 "
        "--out runs/wide\n"
        f"  {prog} quantize --model checkpoints/python-small/oracle --text held-out/* "
        "--out runs/int8\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name, does in {**STEPS, "all": "every step above, in this order"}.items():
        _add_run_arguments(commands.add_parser(name, help=does, description=does))
    does = "compare texts to count the trigram on, by the look-ups that the oracle would accept"
    corpora = commands.add_parser("corpora", help=does, description=does)
    _add_run_arguments(corpora)
    corpora.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.7, 1.0, 1.5], metavar="T",
        help="of the draft's samples; default: 0.7 1.0 1.5",
    )  # fmt: skip
    corpora.add_argument(
        "--shards", type=int, default=16, help="of 16,384 tokens for each text; default: 16"
    )
    does = "train drafts of several shapes alike and compare what they accept and cost"
    shapes = commands.add_parser("shapes", help=does, description=does)
    _add_run_arguments(shapes)
    shapes.add_argument(
        "--shapes", nargs="+", default=["1x96", "2x96", "4x96", "1x160", "2x160"],
        metavar="LAYERSxWIDTH", help="default: 1x96 2x96 4x96 1x160 2x160",
    )  # fmt: skip
    does = "expand a trained model exactly to a larger shape, for measuring speed at that cost"
    widen = commands.add_parser("widen", help=does, description=does)
    widen.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face GPT-2 folder")
    widen.add_argument("--width", required=True, type=int, help="a multiple of the model's width")
    widen.add_argument("--layers", required=True, type=int, help="at least the model's layers")
    widen.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    widen.add_argument("--out", required=True, type=Path, metavar="DIR")
    does = "take the hidden units that weigh least out of a trained model, to train it further"
    prune = commands.add_parser("prune", help=does, description=does)
    prune.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face GPT-2 folder")
    prune.add_argument("--hidden", required=True, type=int, help="units to keep in each layer")
    prune.add_argument("--out", required=True, type=Path, metavar="DIR")
    does = "round a model's weights to 8 bits and say what that costs in bits per byte"
    quantize = commands.add_parser("quantize", help=does, description=does)
    quantize.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    quantize.add_argument("--out", type=Path, metavar="DIR", help="where to save it, if anywhere")
    quantize.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="FILE",
        help="held-out text to measure both models on, a document a file",
    )  # fmt: skip
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/python-small.toml", metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a setting of the config, e.g. --set train_oracle.steps=2000",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="default: runs/<name of the config>"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: checkpoints/<name of the config>"
    )


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Entry point of ``scripts/train.py``; returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    run = {"widen": _widen, "prune": _prune, "quantize": _quantize}.get(args.step, _run)
    return cli.run_command(
        lambda: run(args),
        prefix=prog,
        remedy="free disk space or correct the path",
        interrupted=f"\n{prog}: interrupted; run the same command again to resume",
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _run(args: argparse.Namespace) -> None:
    from ssd_jax.training import config, steps

    settings = config.load(args.config, args.overrides)
    work = args.workdir or Path("runs") / settings.name
    out = args.out or Path("checkpoints") / settings.name
    pipeline = steps.Pipeline(settings, work, out, _say)
    if args.step == "corpora":
        pipeline.corpora(args.temperatures, args.shards)
    elif args.step == "shapes":
        pipeline.shapes(args.shapes)
    else:
        for step in STEPS if args.step == "all" else (args.step,):
            getattr(pipeline, step)()


def _widen(args: argparse.Namespace) -> None:
    from ssd_jax import checkpoint
    from ssd_jax.gpt2 import parameter_count
    from ssd_jax.tokenizer import Tokenizer
    from ssd_jax.training.surgery import widen

    small = checkpoint.load_model(args.model)
    wide = widen(small, width=args.width, layers=args.layers, dtype=args.dtype)
    before, after = parameter_count(small), parameter_count(wide)
    config = small.config
    label = (
        f"widened from {config.n_layer} x {config.n_embd} to {args.layers} x {args.width}: "
        "the function of the small model at the cost of a large one"
    )
    checkpoint.save_model(wide, args.out, dtype=args.dtype, label=label)
    Tokenizer.load(args.model).save(args.out)
    _say(f"{label}; {before:,} to {after:,} parameters, in {args.out}")


def _quantize(args: argparse.Namespace) -> None:
    from ssd_jax import checkpoint
    from ssd_jax.memory import weight_bytes
    from ssd_jax.tokenizer import Tokenizer
    from ssd_jax.training import report
    from ssd_jax.training.sources import read_text

    texts = [read_text(path) for path in args.text]
    tokenizer = Tokenizer.load(args.model)
    model = checkpoint.load_model(args.model)
    rounded = checkpoint.quantize(model)
    measured = report.compare_on({"oracle": model, "int8": rounded}, texts, tokenizer)
    before, after = measured["oracle"], measured["int8"]
    _say(
        f"float32: {before.bits:.4f} bits per byte; int8: {after.bits:.4f} "
        f"({after.bits - before.bits:+.4f}) over {after.tokens:,} tokens; the same likeliest "
        f"token {after.agreement:.1%}, overlap {after.overlap:.1%}"
    )
    if args.out is not None:
        label = f"weights rounded to 8 bits, {after.bits - before.bits:+.4f} bits per byte"
        checkpoint.save_model(rounded, args.out, label=label)
        tokenizer.save(args.out)
        sizes = [weight_bytes(each) / 1e6 for each in (model, rounded)]
        _say(f"a pass reads {sizes[1]:.1f} MB instead of {sizes[0]:.1f}; in {args.out}")


def _prune(args: argparse.Namespace) -> None:
    from ssd_jax import checkpoint
    from ssd_jax.gpt2 import parameter_count
    from ssd_jax.tokenizer import Tokenizer
    from ssd_jax.training.surgery import prune_hidden

    model = checkpoint.load_model(args.model)
    pruned = prune_hidden(model, args.hidden)
    checkpoint.save_model(pruned, args.out, dtype="float32")
    Tokenizer.load(args.model).save(args.out)
    before, after = parameter_count(model), parameter_count(pruned)
    _say(f"{before:,} to {after:,} parameters, in {args.out}")
