"""What a run says: ``halve.json``, ``halve-measured.json``, and the page that is made of both.

It may use ``run``, ``evaluation`` and what lies below. It must never change a checkpoint, only what lies beside it.
"""
