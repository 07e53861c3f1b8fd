"""Good-Turing estimates and Katz's discounts."""

from __future__ import annotations

import numpy as np

MAX_SLOPE = -1.001  # at -1 the line of simple Good-Turing discounts nothing
MIN_DISCOUNT = 0.01  # Katz's formula yields 0, or its rounding noise, where only n_1 is positive
MAX_DISCOUNTED = 5  # Katz's k: counts above it are taken as reliable


def good_turing(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """Adjusted counts ``r*`` for ``r = 1 .. highest`` by simple Good-Turing.

    W. Gale and G. Sampson, "Good-Turing frequency estimation without tears", 1995: Turing's
    estimate ``(r + 1) n[r + 1] / n[r]`` for as long as it differs significantly (1.96 standard
    deviations) from the estimate on the fitted line ``log Z_r = slope log r + const``, and the
    line from there on. (Their last step, rescaling all of ``r*``, is left to Katz's factor.)

    Args:
      counts: the distinct counts ``r`` met, ascending integers from 1.
      frequencies: how many n-grams have each of them, ``n_r > 0``.
      highest: the last ``r`` wanted.

    Returns:
      float64 ``[highest]``.
    """
    line = _line_estimate(counts, frequencies, highest)
    n = _dense(counts, frequencies, highest + 1)
    r, here, above = np.arange(1, highest + 1), n[:-1], n[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        turing = (r + 1) * above / here
        deviation = turing * np.sqrt((1 + above / here) / above)
    differs = (here > 0) & (above > 0) & (np.abs(turing - line) > 1.96 * deviation)
    return np.where(np.logical_and.accumulate(differs), turing, line)


def _dense(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """``n_1 .. n_highest`` as float64."""
    n = np.zeros(highest)
    low = counts <= highest
    n[counts[low] - 1] = frequencies[low]
    return n


def _line_estimate(counts: np.ndarray, frequencies: np.ndarray, highest: int) -> np.ndarray:
    """Good-Turing ``r*`` on a power law fitted to the counts of counts."""
    slope = np.inf
    if len(counts) > 1:
        below = np.concatenate([[0], counts[:-1]])
        above = np.concatenate([counts[1:], [2 * counts[-1] - counts[-2]]])
        # Spread over the gap to its neighbours, a lone n_r = 1 does not bend the line.
        x, y = np.log(counts), np.log(2.0 * frequencies / (above - below))
        x = x - x.mean()
        slope = (x @ y) / (x @ x)
    if slope > MAX_SLOPE:
        # No line, or one that does not lower counts: assume Zipf's law, n_r about r ** -2.
        slope = -2.0
    r = np.arange(1, highest + 1)
    return r * (1.0 + 1.0 / r) ** (slope + 1.0)


def katz_discounts(
    counts: np.ndarray, frequencies: np.ndarray, highest: int = MAX_DISCOUNTED
) -> np.ndarray:
    """Katz's discounts ``d_1 .. d_highest``, each in ``(0, 1]``.

    ``1 - d_r`` is proportional to ``1 - r* / r``, with the factor that frees exactly the
    Good-Turing mass of the unseen, ``sum_r n_r r (1 - d_r) = n_1``. With plain Turing estimates
    that is Katz's formula; solved like this it also holds for smoothed ones. Where the result
    leaves ``[0.01, 1]`` (too few counts), the same is tried with every ``r*`` from the line, then
    without the factor, which always fits.

    Args:
      counts, frequencies: as in :func:`good_turing`.
      highest: Katz's ``k``.

    Returns:
      float64 ``[highest]``.
    """
    r = np.arange(1, highest + 1)
    n = _dense(counts, frequencies, highest)
    line = _line_estimate(counts, frequencies, highest)
    for adjusted in (good_turing(counts, frequencies, highest), line):
        freed = np.sum(n * (r - adjusted))
        if freed > 0:
            discounts = 1.0 - n[0] / freed * (1.0 - adjusted / r)
            if np.all((discounts >= MIN_DISCOUNT) & (discounts <= 1)):
                return discounts
    return line / r
