"""What multiplies: packed and compressed weights, their layers, products timed against dense ones, streamed text.

It may use ``model`` and what lies below. It must never know the packed format on disk, the planner or a run.
"""
