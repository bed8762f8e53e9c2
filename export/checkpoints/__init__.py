"""Reading checkpoints: which files a model has, its weights, its modules and its noise schedule."""

DEMO = "demo"
"""Name of the built-in model, in place of a directory or a hub id."""
