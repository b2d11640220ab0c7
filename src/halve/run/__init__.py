"""One run of pruning a model block by block, and its state on disk, from which another process can go on.

It may use ``planner``, ``text``, ``evaluation``, ``model``, ``solve`` and what lies below. It must never know reports,
pages or what is printed: it tells listeners what happened.
"""
