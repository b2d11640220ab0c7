"""Pictures to what a model sees: found in folders, read, and turned into tensors by the model's own image processor.

May use models and their files, Pillow and ``datasets``. Knows no text, no method and no run.
"""
