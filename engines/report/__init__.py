"""What the compiler made of a graph, read from its detailed log: kernels, bytes and the least time."""
