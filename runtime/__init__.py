"""Bundle -> features -> matches, on the device. Standard library, numpy and pillow only."""

from ditf.runtime.errors import DitfError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching import Matches
from ditf.runtime.model import Model, load
from ditf.runtime.tracking import Tracker

__all__ = ["DitfError", "FeatureMap", "Matches", "Model", "Tracker", "load"]
