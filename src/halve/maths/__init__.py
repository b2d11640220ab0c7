"""Pure functions of tensors: patterns, the regulariser and its proximal operator, Gram matrices, factorisations.

Nothing here knows a model, a file, a logger or a device policy; the same call gives the same answer. It may use the
ground alone. Compiled twins of the proximal operator are in ``kernels``.
"""
