"""The ``halve`` command: arguments in, calls out, what is printed.

It may use everything. Nothing may use it: what a command does can be done without a terminal.
"""
