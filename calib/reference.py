"""What calibration needs of a model, whoever provides it."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Reference(Protocol):
    """The unmodified model, observed at one layer."""

    def hidden_states(self, image: np.ndarray) -> np.ndarray:
        """Image tokens that enter the layer, float32 [N, C], of an image uint8 [H, W, 3]."""
