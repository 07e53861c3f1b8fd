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
        # Of each mode's stages: name, model, and the widths of its passes, the full one first.
        self._stages: dict[str, list[tuple[str, GPT2, tuple[int, ...]]]] = {}
        decoding: dict[tuple[int, int], tuple[GPT2, int]] = {}
        prompt = dict(decoding)
        for mode, (stack, plan) in own.items():
            capacities = Capacities.of(plan, text)
            full, *drafts = capacities.widths
            widths = [(full, *capacities.narrower), *((width,) for width in drafts)]
            named = zip(stack.models.items(), widths, strict=False)
            self._stages[mode] = [(name, model, own_widths) for (name, model), own_widths in named]
            for _, model, widths in self._stages[mode]:
                decoding |= {(id(model), width): (model, width) for width in widths}
                chunks = (plan.chunk, WIDE * plan.chunk)
                prompt |= {(id(model), width): (model, width) for width in chunks}
        self._slots = max(text, *(width for _, width in decoding))
        room = max(self._slots, *(width for _, width in prompt))
        self._decoding = PassClock(decoding, slots=self._slots)
        self._prompt = PassClock(prompt, slots=room, logits=False)
        self._turns = 0

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
        decoding, prompt = (
            {key: statistics.fmean(own) for key, own in clock.seconds.items()}
            for clock in (self._decoding, self._prompt)
        )
        costs: Costs = {}
        for mode, (_, plan) in self._own.items():
            costs[mode] = {}
            for name, model, widths in self._stages[mode]:
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
