"""Katz's back-off trigram in dictionaries and loops: slow, plain, and only for the tests.

Written from the definitions, apart from ``ssd_jax.ngram``: every mass that the module sums up
in classes of counts is a plain sum over the vocabulary here.
"""

import collections
import math
import statistics

K = 5


def counts_of(documents, length):
    """``counts[context][token]`` of the n-grams with ``length`` tokens."""
    counts = collections.defaultdict(collections.Counter)
    for document in documents:
        for end in range(length, len(document) + 1):
            *context, token = (int(t) for t in document[end - length : end])
            counts[tuple(context)][token] += 1
    return counts


def line(n):
    """``r -> r*`` on Gale and Sampson's log-log line through the counts of counts ``n``."""
    seen = sorted(n)
    slope = -2.0
    if len(seen) > 1:
        z = {}
        for i, r in enumerate(seen):
            below = seen[i - 1] if i else 0
            above = seen[i + 1] if i + 1 < len(seen) else 2 * r - below
            z[r] = n[r] / (0.5 * (above - below))
        fit = statistics.linear_regression(
            [math.log(r) for r in seen], [math.log(z[r]) for r in seen]
        )
        if fit.slope <= -1.001:
            slope = fit.slope
    return lambda r: (r + 1) * ((r + 1) / r) ** slope


def simple_good_turing(n):
    """``{r: r*}`` for ``r = 1 .. K``."""
    smooth, adjusted, switched = line(n), {}, False
    for r in range(1, K + 1):
        here, above = n.get(r, 0), n.get(r + 1, 0)
        if not switched and here and above:
            turing = (r + 1) * above / here
            variance = (r + 1) ** 2 * above / here**2 * (1 + above / here)
            switched = abs(turing - smooth(r)) <= 1.96 * math.sqrt(variance)
        else:
            switched = True
        adjusted[r] = smooth(r) if switched else turing
    return adjusted


def discounts(n):
    """``{r: d_r}`` for ``r = 1 .. K`` from counts of counts ``{r: n_r}``."""
    smooth = line(n)
    for adjusted in (simple_good_turing(n), {r: smooth(r) for r in range(1, K + 1)}):
        freed = math.fsum(n.get(r, 0) * (r - adjusted[r]) for r in adjusted)
        if freed > 0:
            factor = n.get(1, 0) / freed
            d = {r: 1 - factor * (1 - adjusted[r] / r) for r in adjusted}
            if all(0.01 <= x <= 1 for x in d.values()):
                return d
    return {r: smooth(r) / r for r in range(1, K + 1)}


class ReferenceKatz:
    """The same model as ``KatzModel.fit(documents, vocab_size, min_trigram_count=...)``.

    With ``kept``, a set of tuples, the bigrams and trigrams outside of it are pruned too.
    """

    def __init__(self, documents, vocab_size, min_trigram_count=1, kept=None):
        self.vocab_size = vocab_size
        self.counts = [counts_of(documents, length) for length in (1, 2, 3)]
        self.discounts = [
            discounts(collections.Counter(c for row in counts.values() for c in row.values()))
            for counts in self.counts
        ]
        self.min_counts = (1, 1, min_trigram_count)
        self.kept = kept

    def distribution(self, context):
        """``P(token | context)`` as a list; ``context`` holds 0, 1 or 2 tokens."""
        order = len(context)
        if order:
            shorter = self.distribution(context[1:])
        else:
            shorter = [1 / self.vocab_size] * self.vocab_size
        row = self.counts[order].get(context, {})
        seen = {
            token: c
            for token, c in row.items()
            if c >= self.min_counts[order]
            and (not order or self.kept is None or (*context, token) in self.kept)
        }
        if not seen and order:
            return shorter
        d = self.discounts[order]
        mass = {token: d.get(c, 1.0) * c for token, c in seen.items()}
        unseen = [token for token in range(self.vocab_size) if token not in seen]
        if not unseen:
            left = 0.0
        elif len(seen) < len(row) or any(d.get(c, 1.0) < 1 for c in row.values()):
            left = math.fsum(c - mass.get(token, 0.0) for token, c in row.items())
        else:
            left = 1.0
        norm = math.fsum(mass.values()) + left
        below = math.fsum(shorter[token] for token in unseen)
        return [
            mass[token] / norm if token in seen else left / norm * shorter[token] / below
            for token in range(self.vocab_size)
        ]

    def perplexity(self, documents):
        terms = [
            math.log(self.distribution(tuple(document[max(0, i - 2) : i]))[document[i]])
            for document in documents
            for i in range(len(document))
        ]
        return math.exp(-math.fsum(terms) / len(terms))
