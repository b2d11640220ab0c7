"""Ways to learn, each in its file."""
