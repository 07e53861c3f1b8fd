"""The command ``ssd-jax``: one name for what lies in ``scripts/`` of a clone."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import ssd_jax
from ssd_jax.cli import Parser, leave

# Name: the module whose ``main`` it calls, and what it does.
COMMANDS = {
    "decode": ("ssd_jax.decode_command", "continue a prompt; compare and look at the modes"),
    "train": ("ssd_jax.training.command", "from source text to a trio"),
    "benchmark": ("ssd_jax.benchmark.command", "measure the modes over many prompts"),
    "tune": ("ssd_jax.tuning.command", "find and keep the fastest plans for this device"),
    "gpu-report": ("ssd_jax.gpu_report", "what the loop becomes on a GPU that need not be there"),
}


def build_parser() -> Parser:
    lines = "\n".join(f"  {name:<11} {does}" for name, (_, does) in COMMANDS.items())
    parser = Parser(
        prog="ssd-jax",
        description="Staged speculative decoding for GPT-2.",
        epilog=f"commands:\n{lines}\n\n`ssd-jax COMMAND --help` explains each.\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own")
    parser.add_argument("--version", action="version", version=f"ssd-jax {ssd_jax.__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``ssd-jax``; returns the exit status."""
    args = build_parser().parse_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    return module.main(args.arguments, prog=f"ssd-jax {args.command}")


def run() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    run()
