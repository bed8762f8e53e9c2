"""Reading checkpoints: which files a model has, its weights, its modules and its noise schedule."""
