"""One matrix, from its statistics to verified weights: methods, refits, objectives, and what goes with them.

It may use ``maths`` and the ground. It must never know a model, blocks, text or files: what is solved is a tensor with
the Gram matrix of its inputs.
"""
