"""What runs a pruned model: packed weights, and products with them.

It knows patterns, and nothing of how a model was pruned.
"""
