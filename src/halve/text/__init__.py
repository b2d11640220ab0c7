"""Text to tokens: documents, packing, evaluation windows, pairs for encoder-decoders, and text that models write.

It may use ``model`` and what lies below. It must never know how tokens are used.
"""
