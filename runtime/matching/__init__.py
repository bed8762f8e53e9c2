"""Matching feature maps: points, mutual matches, dense flow, masks and homographies."""

from ditf.runtime.matching.mutual import MutualMatches, mutual_matches, mutual_points
from ditf.runtime.matching.points import Matches, PointMatcher, match_points

__all__ = ["Matches", "MutualMatches", "PointMatcher", "match_points", "mutual_matches", "mutual_points"]
