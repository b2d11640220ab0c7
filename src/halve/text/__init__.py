"""Text to tokens: documents, packing, evaluation windows, and text that a model writes itself.

It may use ``model`` and what lies below. It must never know how tokens are used.
"""
