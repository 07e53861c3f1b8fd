"""Staged speculative decoding for GPT-2 in pure JAX (Spector and Ré, arXiv 2308.04623).

Array axes, in every signature and docstring of this package:

  B  batch rows          T  tokens of one forward pass   S  cache slots
  N  tree nodes          W  nodes selected for a pass    C  candidate children
  K  trunk nodes         P  nodes of an accepted path    V  vocabulary
  H  heads               D  head size                    E  model width
  L  layers              M  model stages (oracle first, then drafts)
"""
