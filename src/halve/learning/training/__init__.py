"""One training: its rows of text, its loss, the Trainer with a learner's hooks, its states, and what it publishes."""
