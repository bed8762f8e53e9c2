"""Drawing calibrations, latencies and parity."""
