"""End-to-end learning: a pruned model fine-tuned with its mask kept, and masks that are learned with the weights.

The room may use models, text, `halve.maths`, checkpoints and reports. It must never know the block loop of
`halve.run`, nor the solvers of `halve.solve`: what joins learning with a refit stands in the hall, `halve.merging`.
"""
