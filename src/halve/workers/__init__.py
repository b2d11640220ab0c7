"""Pruning on several workers: processes on this machine or on others, placed and reached by Ray.

The driver plans, keeps finished blocks and writes the checkpoint, as a run without workers does. A worker holds some
shards of the calibration set, takes them through the blocks, and prunes matrices that it is given.
"""
