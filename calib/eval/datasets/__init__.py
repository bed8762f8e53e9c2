"""Readers of the benchmarks' own folders, one file each, and what they yield."""
