"""The packed format on disk: its manifest, writing it, reading it back byte for byte, and models loaded from it.

It may use ``runtime``, ``model``, ``maths`` and ``checkpoint``. It must never select or change a weight.
"""
