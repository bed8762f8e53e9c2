"""The built-in demo model: a small DiT, trained on drawn animals (demo_model/README.md)."""

from __future__ import annotations

from ditf.export.families.base import Defaults

DEMO_DEFAULTS = Defaults(
    layer=9,
    timestep=100,
    source="the best of those tried on the creatures' validation split (demo_model/README.md)",
)
