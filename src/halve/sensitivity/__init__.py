"""What a matrix costs: the damage that pruning it alone does to what the model says, and what to leave dense for that.

It may use ``model``, ``maths`` and what lies below ``run``. It never changes a weight for good, and knows neither the
methods that will prune the model nor what is done with the choice.
"""
