"""DiTF features on the device: `load` a bundle, compute `features`, `match` points.

>>> import ditf
>>> model = ditf.load("bundles/demo-l9-fp16")
>>> source, target = model.features("left.jpg"), model.features("right.jpg")
>>> model.match(source, target, [[120, 88]]).points
"""

from ditf.runtime import DitfError, FeatureMap, Matches, Model, load
from ditf.runtime.telemetry import switch_off

switch_off()  # here, which every import of a library that reports usage comes after

__version__ = "0.1.0"
__all__ = ["DitfError", "FeatureMap", "Matches", "Model", "__version__", "load"]
