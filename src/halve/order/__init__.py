"""Orders of channels that fold into neighbouring weights, chosen so that pruning to N:M costs less.

A block computes the same function in any such order, and its checkpoint is an ordinary one. Folds are found by trying
and proven by running the block (`finding`, `proving`), an order is chosen by the loss that pruning would take
(`choosing`), and applied to weights (`folds`) and statistics (`reordering`); `recording` and `undoing` are of what is
on record of it. It knows blocks and matrices, no run.
"""
