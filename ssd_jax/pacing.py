"""Run-time adaptation: how many nodes the oracle looks at, and when drafting rests.

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
# Longest rest, in rounds. A useless draft then costs one attempt in so many tokens.
_LONGEST_REST = 64
# A rest is so many times as long as the one before.
_LONGER = 4
# The first rest where no round has paid yet; after one that did, it is a single round.
_UNTRIED_REST = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """What recent rounds earned; part of the loop's state.

    Attributes:
      tokens, cost: float32 running sums over the rounds that drafted, per batch row.
      surplus: float32 running mean of tokens less cost of those rounds.
      rest: int32, rounds of plain decoding still to come.
      next_rest: int32, how many there will be after the next disappointment.
    """

    tokens: jax.Array
    cost: jax.Array
    surplus: jax.Array
    rest: jax.Array
    next_rest: jax.Array

    @classmethod
    def start(cls) -> Pace:
        """Some credit in advance: about two tokens a unit, and one bad round is no reason."""
        f, i = np.float32, np.int32
        fields: Any = dict(
            tokens=f(4), cost=f(2), surplus=f(0.5), rest=i(0), next_rest=i(_UNTRIED_REST)
        )
        return cls(**fields)

    @property
    def drafting(self) -> jax.Array:
        """bool: drafting does not rest."""
        return self.rest == 0

    def rested(self) -> Pace:
        """The pace after a round that drafted nothing."""
        return dataclasses.replace(self, rest=jnp.maximum(self.rest - 1, 0))


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
    )
    return jax.tree.map(lambda a, b: jnp.where(pace.drafting, a, b), drafted, pace.rested())
