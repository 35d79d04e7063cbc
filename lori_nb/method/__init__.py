"""The two methods, as mathematics on tensors.

A low-rank adapter changes a frozen linear module W (d_out × d_in) by ΔW = s·B A:

    y = W x + s·B (A x)        A (r × d_in),  B (d_out × r),  s = α / r

**LoRI** (arXiv 2504.07448) keeps every task's A at a random draw, never trained, and trains B alone: all of it
(LoRI-D), or only the entries under a task mask M ∈ {0,1} (d_out × r) that holds the largest |B| of a first training
(LoRI-S). Tasks that read the input through different random subspaces, and write through few entries, should disturb
each other little.

**Ortho-LoRA** (arXiv 2601.09684) trains one adapter on T tasks at once. In every A and every B apart it looks at the
tasks' gradients g_1 … g_T; where two conflict, ⟨g_i, g_j⟩ < 0, each is projected onto the orthogonal complement of
the other before they are added.

The papers' symbols, here and in every docstring:

======= ================ ===========================================================================
symbol  shape            meaning
======= ================ ===========================================================================
W       d_out × d_in     frozen base weight
A       r × d_in         down-projection: what the adapter reads; frozen in LoRI
B       d_out × r        up-projection: what it writes; zero at the start
s                        α / r
ΔW      d_out × d_in     s·B A, never formed where factors do
M       d_out × r        mask on B; *sparsity* is its share of zeros
T                        number of tasks
g_t     as its tensor    gradient of task t's loss
G       T × T            Gramian of one block, G_ij = ⟨g_i, g_j⟩; a block is one tensor by default
C       T × T            projection as coefficients: the projected g_i is Σ_t C_it g_t
======= ================ ===========================================================================

In reading order:

- ``adapters``: factors as plain data, attach and detach; ``subspaces``: A from a seed; ``adapter_file``: an adapter on
  disk.
- ``masks``: which entries of B are trained: by magnitude or at random, exactly k of them, at any scope.
- ``task_gradients``: every task's gradient of A and B from one backward pass.
- ``projection``: Ortho-LoRA's coefficients C from the Gramians of all blocks at once, and the literal loop.
- ``solvers``: other coefficients by name; ``conflicts``: how much tasks conflict in a block, and one gradient out of T.

This room knows torch and numpy, torchjd for other conflict solvers, and no other room.
"""
