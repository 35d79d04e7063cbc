"""Interference, measured: between adapters as they are, once merged, and over time.

Adapters that work alone can hurt each other when they share weights (merging) or time (continual learning). Each
module here takes plain tensors or numbers and returns numbers; none touches a model, and none writes a weight.

- ``overlap``: do two updates ΔW (d_out × d_in) point the same way, read the same input subspace (rows of A,
  r × d_in), write the same output subspace (columns of B, d_out × r)? From factors alone. ``interference``: distances
  of these subspaces, alignment, singular task interference, signs, masks; ``nulls``: what chance gives;
  ``reduced``: the small core K of ΔW = U K Vᵀ that all of this is computed on.
- ``merging``: N adapters in, one out, Σ_i w_i s_i B_i A_i, exact by concatenation or approximate by adding factors;
  ``spectral_merging``: merges on singular vectors (SVD, TSV-M, Iso-C, KnOTS, Core Space), of small cores;
  ``elementwise_merging``: on the entries of ΔW (magnitude, TIES, DARE), one module at a time.
- ``continual``: R (stages × tasks), the score on task j after training stage i; forgetting and transfer read off it.
- ``pass_at_k``: the chance that one of k drawn programs passes, from n of which c did.
- ``statistics``: what n seeds or n rows can say: t, Wilson and crossed (seeds × rows) intervals.
- ``association``: whether one relation between adapters goes with another, adapters permuted and drawn, not pairs.
- ``equivalence``: whether a difference lies within a margin, and what the design could tell at best.

Symbols as on the first page of :mod:`lori_nb.method`. This room imports from ``method`` alone.
"""

# importing these registers their measures and merges
from lori_nb.analysis import elementwise_merging, interference, spectral_merging  # noqa: F401
