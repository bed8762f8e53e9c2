"""What runs on the device: it opens a bundle, computes features and matches them.

Importing it needs the standard library, numpy and pillow only.
"""

from ditf.runtime.errors import DitfError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.flow import Flow
from ditf.runtime.matching.homography import Homography, find_homography
from ditf.runtime.matching.mutual import MutualMatches
from ditf.runtime.matching.points import Matches
from ditf.runtime.matching.propagation import Propagator
from ditf.runtime.model import Model, load
from ditf.runtime.tracking import Tracker

__all__ = [
    "DitfError",
    "FeatureMap",
    "Flow",
    "Homography",
    "Matches",
    "Model",
    "MutualMatches",
    "Propagator",
    "Tracker",
    "find_homography",
    "load",
]
