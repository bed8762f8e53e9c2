"""The formats that weights are stored in."""
