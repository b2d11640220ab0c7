"""Halve prunes trained neural networks to N:M sparsity."""
