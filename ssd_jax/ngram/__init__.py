"""Katz back-off trigram: fitted and stored on the host, looked up on the device.

The model (S. Katz, "Estimation of probabilities from sparse data for the language model
component of a speech recognizer", 1987). With ``C`` the counts of the order at hand::

    P(c | context) = d_C C(context c) / N(context)       where the n-gram was seen
                   = alpha(context) P(c | shorter)       where it was not

``d_r`` is a Good-Turing discount for ``r <= 5`` and 1 above; ``alpha`` hands the discounted
mass to the unseen continuations. The recursion ends in the uniform distribution, so unigrams
back off like every other order. Two rules the book leaves open, so that every probability is
positive and every context sums to 1: a context that saw all of V keeps its whole mass, and a
context that loses no mass to discounting gives one pseudo-count to its unseen continuations
(as does a corpus without tokens: all its contexts are uniform).

Axes of this module, besides those of the package: R contexts of one order, G distinct n-grams
of one order. An n-gram is one integer, its tokens read as digits in base V.
"""

from ssd_jax.ngram.discounts import good_turing as good_turing
from ssd_jax.ngram.discounts import katz_discounts as katz_discounts
from ssd_jax.ngram.katz import KatzModel as KatzModel
from ssd_jax.ngram.tables import NGramTables as NGramTables
