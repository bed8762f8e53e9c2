"""Benchmarks of correspondence: their data, protocols and metrics."""
