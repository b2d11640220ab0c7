"""Bytes of plain checkpoints on disk: reading foreign ones, writing our own.

What is here finds and validates files, turns parameters into tensors on disk and back, writes files that are whole or
absent, asks whether there is room, holds a directory's lock, and publishes what was staged. It may use the ground
(errors, device, memory, checks, lookup). It must never know what pruning is: no pattern, no method, no run.
"""
