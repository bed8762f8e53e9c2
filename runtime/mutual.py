"""An alias of `ditf.runtime.matching.mutual`: version 0.1 documented this name."""

from ditf.runtime.matching.mutual import mutual_matches, mutual_points

__all__ = ["mutual_matches", "mutual_points"]
