"""Measuring a model: perplexity on texts, accuracy on tasks, and what users ask to have measured.

It may use ``text`` and what lies below. It must never know how a model was pruned.
"""
