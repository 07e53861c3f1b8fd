"""What the passes of each mode take alone, timed in turns with the texts.

A shared machine is fast in one minute and slow in the next. Passes timed after all texts would
belong to another minute than these, by which the share of time outside the models was once found
to be negative.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ssd_jax.benchmark.measure import Record
from ssd_jax.benchmark.summary import Costs
from ssd_jax.costs import PassClock
from ssd_jax.gpt2 import GPT2
from ssd_jax.plan import WIDE, Capacities, Plan
from ssd_jax.stack import Stack

# Turns in which the passes are timed at least.
_FEWEST_TURNS = 8
# So many prompts tell how long texts are.
_TYPICAL = 8
_LOOP_SECONDS = 0.05

_Passes = dict[tuple[int, int], tuple[GPT2, int]]  # by the model's id and their width


def enough(records: Sequence[Record], prompts: int) -> bool:
    """Whether the records of a run over so many prompts tell how long its texts are."""
    return len({record["prompt"] for record in records}) >= min(_TYPICAL, prompts)


class PassesAlone:
    """A clock for all passes that some modes make, each timed once however many modes make it."""

    def __init__(self, own: Mapping[str, tuple[Stack, Plan]], records: Sequence[Record]):
        """Compiles.

        Args:
          own: stack and plan by mode.
          records: of texts as long as is typical, which is how long a cache is.
        """
        text = int(statistics.median(r["prompt_tokens"] + r["new_tokens"] for r in records))
        self._own = own
        self._capacities = {mode: Capacities.of(plan, text) for mode, (_, plan) in own.items()}
        self._slots = max(text, *(w for c in self._capacities.values() for w in c.widths))
        chunk = max(plan.chunk for _, plan in own.values())
        decoding: _Passes = {}
        prompt: _Passes = {}
        for mode, (stack, plan) in own.items():
            for model, widths in zip(stack.models.values(), self._widths(mode), strict=False):
                decoding |= {(id(model), width): (model, width) for width in widths}
                chunks = (plan.chunk, WIDE * plan.chunk)
                prompt |= {(id(model), width): (model, width) for width in chunks}
        self._decoding = _Clock(decoding, slots=self._slots)
        self._prompt = _Clock(prompt, slots=max(self._slots, WIDE * chunk), logits=False)
        self._turns = 0

    def _widths(self, mode: str) -> list[tuple[int, ...]]:
        """Of the passes of the oracle and of each draft."""
        capacities = self._capacities[mode]
        oracle, *drafts = capacities.widths
        return [(oracle, *capacities.narrower), *((width,) for width in drafts)]

    def turn(self) -> None:
        """Time every pass once."""
        self._decoding.turn()
        self._prompt.turn()
        self._turns += 1

    def costs(self) -> Costs:
        """Seconds of the passes, means over all turns as a text's seconds are over its rounds; see
        the package."""
        while self._turns < _FEWEST_TURNS:
            self.turn()
        decoding, prompt = self._decoding.means(), self._prompt.means()
        costs: Costs = {}
        for mode, (stack, plan) in self._own.items():
            costs[mode] = {}
            for (name, model), widths in zip(
                stack.models.items(), self._widths(mode), strict=False
            ):
                width, *narrower = widths
                costs[mode][name] = {
                    "width": width,
                    "seconds": decoding[id(model), width],
                    "prefill_width": plan.chunk,
                    "prefill_seconds": prompt[id(model), plan.chunk],
                    "wide_prefill_seconds": prompt[id(model), WIDE * plan.chunk],
                    # Names of JSON are strings.
                    "narrower": {str(w): decoding[id(model), w] for w in narrower},
                    "slots": self._slots,
                }
        return costs


class _Clock:
    """Of passes of one kind."""

    def __init__(self, passes: _Passes, **options):
        self._keys = list(passes)
        self._clock = PassClock(list(passes.values()), loop_seconds=_LOOP_SECONDS, **options)

    def turn(self) -> None:
        self._clock.turn()

    def means(self) -> dict[tuple[int, int], float]:
        return dict(zip(self._keys, map(statistics.fmean, self._clock.seconds), strict=True))
