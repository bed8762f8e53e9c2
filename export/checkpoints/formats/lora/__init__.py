"""LoRA files, folded into the weights of a model."""
