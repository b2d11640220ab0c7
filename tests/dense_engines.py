"""A dense engine whose times are known beforehand, in place of one that is installed."""

from halve.errors import HalveError


class Steady:
    """Takes a second outside of the blocks and a quarter of one in each; kinds are as fast as their number says."""

    name = "steady"
    kinds = ("x1", "x2")

    def __init__(self, failing=None):
        self.failing = failing
        self.checked, self.asked = [], []

    def check(self, model, skeleton):
        self.checked.append((model, type(skeleton).__name__))

    def seconds(self, skeleton, kind, blocks, threads):
        self.asked.append((type(skeleton).__name__, kind, blocks, threads))
        if kind == self.failing:
            raise HalveError("it fell over")
        return (1.0 + 0.25 * blocks) / int(kind[1:])
