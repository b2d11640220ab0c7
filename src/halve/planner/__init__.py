"""Before anything is pruned: where sparsity makes a model faster on this machine, measured.

It may use ``runtime``, ``model`` and what lies below. It must never need a model's weights to be their real values, and
knows no other engine: a contender is handed in.
"""
