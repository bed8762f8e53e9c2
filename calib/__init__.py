"""What the activations are, and whether a bundle still computes them. numpy only."""
