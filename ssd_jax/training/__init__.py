"""From a folder of source text to a matched trio: oracle, distilled draft, Katz trigram.

:mod:`.config` reads the run's settings, :mod:`.data` gathers, filters, splits and encodes the
text, :mod:`.loop` trains a model, :mod:`.sample` draws the n-gram's corpus from the draft,
:mod:`.report` assembles and describes the result, and :mod:`.steps` strings them together.
"""
