"""Transformer blocks, their layers and the trunks that they make, as they are traced."""
