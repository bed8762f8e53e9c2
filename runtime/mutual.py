"""The name that 0.1 documented for `ditf.runtime.matching.mutual`."""

from ditf.runtime.matching.mutual import mutual_matches, mutual_points

__all__ = ["mutual_matches", "mutual_points"]
