"""An hour of mixed requests in one process: memory flat, no recompilation, every text plain
decoding's.

``python tests/soak.py --seconds 3600`` prints a line a minute and ends with a verdict and a status;
the test suite runs a short form.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd_jax
from ssd_jax import batch

PAGE = os.sysconf("SC_PAGE_SIZE")
GROWTH = 48 * 2**20  # bytes that may come and go with the allocator, of hundreds in use
CAPACITY = 192  # of text, the one bucket of all requests
BEGINNINGS = (
    "def ",
    "class Stack:\n",
    "import os\n\n",
    "# é漢字\n",
    "for i in range(",
    "\n\n    return ",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a soak found.

    Attributes:
      requests, tokens: how many.
      different: requests whose text was not plain decoding's.
      compiled: programs made after the warm-up.
      growth: bytes of memory gained between the middle and the end.
    """

    requests: int
    tokens: int
    different: int
    compiled: int
    growth: int

    @property
    def sound(self) -> bool:
        return not self.different and not self.compiled and self.growth < GROWTH


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def request(rng: random.Random) -> tuple[str, list[str], dict[str, Any]]:
    """A kind of call, its prompts and options."""
    kind = rng.choice(["alone", "alone", "batch", "stream", "session", "left"])
    prompts = [rng.choice(BEGINNINGS) * rng.randint(1, 4) for _ in range(4)]
    options: dict[str, Any] = dict(max_new_tokens=rng.randint(129, 144), seed=rng.randrange(2**64))
    if rng.random() < 0.6:
        options |= dict(temperature=rng.choice([0.5, 1.0]), top_k=rng.choice([None, 20]))
    if rng.random() < 0.3:
        options["stop_strings"] = rng.choice([["\n\n"], ["return", "self"]])
    return kind, prompts if kind == "batch" else prompts[:1], options


def answer(stack, session, kind: str, prompts: list[str], options: dict[str, Any]) -> list[str]:
    if kind == "batch":
        return [one.text for one in ssd_jax.generate(stack, prompts, batch_size=4, **options)]
    if kind == "session":
        return [session.generate(prompts[0], **options).text]
    if kind == "alone":
        return [ssd_jax.generate(stack, prompts[0], **options).text]
    with ssd_jax.stream(stack, prompts[0], **options) as pieces:
        if kind == "left":  # in the middle
            return [next(pieces, "")]
        return ["".join(pieces)]


def soak(stack, seconds: float, seed: int = 0, say=print, requests: int | None = None) -> Verdict:
    """Ask for so many seconds, or so many times."""
    rng = random.Random(seed)
    session = ssd_jax.Session(stack, max_tokens=CAPACITY)
    for warm in range(60):  # every kind of call, greedy and sampled
        kind, prompts, options = request(random.Random(1000 + warm))
        answer(stack, session, kind, prompts, options)
        for prompt in prompts:
            ssd_jax.generate(stack, prompt, mode="baseline", **options)
    programs, began, told = len(batch._programs), time.monotonic(), time.monotonic()
    count = tokens = different = 0
    sizes = [(0.0, resident())]

    def done() -> float:
        spent = (time.monotonic() - began) / seconds
        return spent if requests is None else count / requests

    while done() < 1:
        kind, prompts, options = request(rng)
        texts = answer(stack, session, kind, prompts, options)
        for prompt, text in zip(prompts, texts, strict=True):
            plain = ssd_jax.generate(stack, prompt, mode="baseline", **options)
            tokens += len(plain.tokens)
            different += not (plain.text.startswith(text) if kind == "left" else plain.text == text)
        count += 1
        sizes.append((done(), resident()))
        if time.monotonic() - told > 60:
            told = time.monotonic()
            say(f"{done():.0%}: {count} requests, {sizes[-1][1] / 2**20:.0f} MiB", flush=True)
    middle = max(size for part, size in sizes if part <= 0.5)
    return Verdict(
        requests=count,
        tokens=tokens,
        different=different,
        compiled=len(batch._programs) - programs,
        growth=max(size for part, size in sizes if part > 0.5) - middle,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="default: 3600")
    parser.add_argument("--checkpoint", default="python-small", help="default: python-small")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    verdict = soak(ssd_jax.load(args.checkpoint), args.seconds, args.seed)
    print(verdict, "sound" if verdict.sound else "NOT sound")
    return 0 if verdict.sound else 1


if __name__ == "__main__":
    sys.exit(main())
