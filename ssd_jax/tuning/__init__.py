"""The tuner: finds the plan that suits a device and a stack.

Imports go one way: :mod:`logs` (what the drafts say about the tree below every token of a text),
:mod:`replay` (what a plan would have done with it), :mod:`cost` (what that takes on this device),
:mod:`search` (the best plans by that), :mod:`tuner` (all of it, and the runs that decide),
:mod:`command`. What is found is kept by :mod:`ssd_jax.tuned`.

Counterfactual replay: the text does not depend on the plan, so the oracle writes it once. What a
dynamic tree becomes depends on candidates beside the text too, which compete for places in a
pass. So one generous tree is logged below *every* token of the text, not only where some plan's
rounds began: a narrower plan commits fewer tokens a round and starts the next one elsewhere.
Whatever a draft says depends only on the tokens before it; the trees of one text are therefore
merged by context. The n-gram stage needs no log: it is a function of the text, and of the tables.
"""
