"""A bundle and its files: the manifest, graphs, conditions, golden data and signatures."""
