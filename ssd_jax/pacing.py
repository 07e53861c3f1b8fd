"""Run-time adaptation: how many nodes the oracle looks at, when drafting rests, and whether the
model drafts are asked at all.

Costs are in units of one plain step, so that plain decoding earns one token for each unit.
None of it touches the text: it decides how much is speculated, never what is said.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Weight of the past, each round, in the running sums.
_MEMORY = 0.8
# Longest rest, in rounds, and as many from a trial to the next: a useless draft then costs one
# attempt and one trial in so many tokens.
_LONGEST_REST = 64
# A rest is so many times as long as the one before.
_LONGER = 4
# The first rest where no round has paid yet; after one that did, it is a single round.
_UNTRIED_REST = 16
#: A trial asks about so many of the text's newest tokens,
TRIAL = 16
#: which count if they are among so many of the draft's best.
AMONG = 3
# So many must, in the mean of a batch. Of 1,006 trials the shipped draft fails one, and drafts of
# random weights pass one in a hundred (docs/performance.md).
_LEAST = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """What recent rounds earned; part of the loop's state.

    Attributes:
      tokens, cost: float32 running sums over the rounds that drafted, per batch row.
      surplus: float32 running mean of tokens less cost of those rounds.
      rest: int32, rounds of plain decoding still to come.
      next_rest: int32, how many there will be after the next disappointment.
      trial: int32, rounds in which the model drafts are still not asked, since the last trial
        failed; 0 when one is due, -1 once one has been passed.
    """

    tokens: jax.Array
    cost: jax.Array
    surplus: jax.Array
    rest: jax.Array
    next_rest: jax.Array
    trial: jax.Array

    @classmethod
    def start(cls) -> Pace:
        """Some credit in advance: about two tokens a unit, and one bad round is no reason."""
        f, i = np.float32, np.int32
        fields: Any = dict(
            tokens=f(4),
            cost=f(2),
            surplus=f(0.5),
            rest=i(0),
            next_rest=i(_UNTRIED_REST),
            trial=i(0),
        )
        return cls(**fields)

    @property
    def drafting(self) -> jax.Array:
        """bool: drafting does not rest."""
        return self.rest == 0

    @property
    def trusted(self) -> jax.Array:
        """bool: the model drafts are asked."""
        return self.trial <= 0

    @property
    def trial_due(self) -> jax.Array:
        """bool: the first draft is to be tried before the next round."""
        return self.drafting & (self.trial == 0)

    def rested(self) -> Pace:
        """The pace after a round that drafted nothing."""
        return dataclasses.replace(self, rest=jnp.maximum(self.rest - 1, 0), trial=self._waited())

    def tried(self, foreseen: jax.Array) -> Pace:
        """The pace after a trial in which a draft had ``foreseen`` of a text's newest tokens among
        its best: float32, the mean of a batch."""
        trial = jnp.where(foreseen < _LEAST, _LONGEST_REST, -1)
        return dataclasses.replace(self, trial=trial)

    def _waited(self) -> jax.Array:
        return jnp.where(self.trial > 0, self.trial - 1, self.trial)


def best_width(
    pace: Pace, gain: jax.Array, widths: tuple[int, ...], row_cost: jax.Array
) -> jax.Array:
    """Which of the oracle's compiled widths to use.

    A round that yields ``E`` tokens at cost ``c`` is worth ``E - rate c`` where time could buy
    ``rate`` tokens a unit elsewhere: the rule that maximises tokens per unit in the long run.

    Args:
      pace: what recent rounds earned.
      gain: ``[W]`` float32, probability that the oracle accepts each node, best first, the
        root among them.
      widths: ascending; the last is at most W.
      row_cost: float32, cost of each row of a pass beyond the first.

    Returns:
      int32, an index into ``widths``.
    """
    rate = jnp.maximum(pace.tokens / pace.cost, 1.0)
    rows = jnp.asarray(widths)
    expected = jnp.cumsum(gain)[rows - 1]
    worth = expected - rate * row_cost * (rows - 1).astype(jnp.float32)
    return jnp.argmax(worth).astype(jnp.int32)


def after_round(pace: Pace, tokens: jax.Array, cost: jax.Array) -> Pace:
    """The pace after a round that committed ``tokens`` at ``cost``, both float32 per row.

    When drafting no longer pays, it rests: for one round, then four, sixteen and so on until an
    attempt pays. What has never paid rests for sixteen at once: a short text has few attempts then.
    """
    surplus = (pace.surplus + tokens - cost) / 2
    failed = surplus < 0
    longer = jnp.minimum(_LONGER * pace.next_rest, _LONGEST_REST)
    drafted = Pace(
        tokens=_MEMORY * pace.tokens + tokens,
        cost=_MEMORY * pace.cost + cost,
        # The attempt after a rest is judged alone.
        surplus=jnp.where(failed, 0.0, surplus),
        rest=jnp.where(failed, pace.next_rest, 0),
        next_rest=jnp.where(failed, longer, jnp.where(tokens < cost, pace.next_rest, 1)),
        trial=pace._waited(),
    )
    return jax.tree.map(lambda a, b: jnp.where(pace.drafting, a, b), drafted, pace.rested())
