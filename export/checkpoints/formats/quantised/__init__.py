"""Quantised weights, read as the numbers that they stand for."""
