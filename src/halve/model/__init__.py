"""A model as blocks and matrices: which parameters can be pruned, how blocks are run one by one, what they are fed.

It may use ``solve``, ``maths`` and the ground. It must never know text, files or the run that drives it.
"""
