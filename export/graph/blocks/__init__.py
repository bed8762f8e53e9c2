"""Transformer blocks and their layers, as they are traced."""
