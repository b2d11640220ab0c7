"""Processes that Ray started, told from those of other tests that run at the same time."""

import psutil


def workers_below(process):
    """Return the processes below one that have a worker in them."""
    try:
        return [each for each in process.children(recursive=True) if _is_worker(each)]
    except psutil.NoSuchProcess:  # it has just ended itself
        return []


def _is_worker(process):
    try:
        return process.cmdline()[0].startswith("ray::Worker")
    except (psutil.Error, IndexError):  # it has just ended
        return False
