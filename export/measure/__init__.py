"""Runs the unmodified model: calibration, golden outputs, activation ranges."""
