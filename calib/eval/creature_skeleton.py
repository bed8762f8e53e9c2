"""The skeleton of a creature: joints and sizes of an animal in a pose, by species."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KEYPOINTS = (
    "nose", "eye", "ear", "withers", "back", "tail base", "tail tip", "belly", "front foot", "hind foot",
)  # fmt: skip
"""The keypoints of every picture, in the order of `Skeleton.keypoints`; the feet are the near ones."""


@dataclass(frozen=True)
class Proportions:
    """Proportions of a species, in units of its body's length from shoulder to hip."""

    depth: float  # of the body, top to bottom
    leg: float
    leg_width: float
    neck: float
    neck_angle: float  # degrees above the horizontal
    neck_width: float
    head: float  # radius
    snout: float
    ear: float
    ear_width: float
    tail: float
    tail_angle: float  # degrees above the horizontal, backwards
    tail_width: float


SPECIES = {
    "dog": Proportions(0.46, 0.55, 0.13, 0.30, 45, 0.24, 0.18, 0.22, 0.20, 0.12, 0.50, 45, 0.08),
    "horse": Proportions(0.50, 0.85, 0.12, 0.60, 55, 0.26, 0.15, 0.34, 0.13, 0.07, 0.65, -55, 0.12),
    "giraffe": Proportions(0.46, 1.00, 0.11, 1.15, 68, 0.18, 0.13, 0.22, 0.12, 0.06, 0.45, -65, 0.05),
    "elephant": Proportions(0.78, 0.55, 0.22, 0.25, 25, 0.40, 0.27, 0.50, 0.34, 0.30, 0.35, -60, 0.05),
    "crocodile": Proportions(0.36, 0.24, 0.14, 0.16, 5, 0.28, 0.18, 0.45, 0.06, 0.06, 0.95, -5, 0.20),
    "cat": Proportions(0.42, 0.42, 0.12, 0.20, 40, 0.22, 0.22, 0.08, 0.22, 0.14, 0.85, 60, 0.08),
    "rabbit": Proportions(0.60, 0.32, 0.15, 0.16, 50, 0.28, 0.24, 0.12, 0.50, 0.11, 0.16, 30, 0.16),
    "pig": Proportions(0.64, 0.32, 0.15, 0.14, 15, 0.44, 0.24, 0.20, 0.16, 0.14, 0.25, 40, 0.05),
}
"""Species by name; a creature's class label is its index here."""

_VARIATION = 0.10
"""Relative standard deviation of every proportion within a species."""


class Skeleton:
    """Joints of one animal in a pose, in units of its body's length; it faces right and y points down."""

    def __init__(self, rng: np.random.Generator, species: Proportions) -> None:
        def varied(value: float) -> float:
            return float(value * np.exp(_VARIATION * rng.standard_normal()))

        s = species
        self.half = varied(s.depth) / 2
        tilt = math.radians(rng.normal(0, 6))
        along = _direction(tilt)
        self.hip, self.shoulder = -0.5 * along, 0.5 * along
        self.up = np.array([along[1], -along[0]])
        self.leg_width = varied(s.leg_width)
        leg = varied(s.leg)
        self.legs = [
            self._leg(rng, joint, leg, bend)
            for joint, bend in ((self.hip, 1), (self.shoulder, -1))
            for _ in "fn"
        ]
        angle = tilt + math.radians(s.neck_angle + rng.normal(0, 14))
        self.neck_width = varied(s.neck_width)
        self.neck_base = self.shoulder + self.up * self.half * 0.3
        self.head_radius = varied(s.head)
        self.head = self.neck_base + _direction(angle) * (varied(s.neck) + 0.6 * self.head_radius + 0.1)
        nod = math.radians(rng.normal(-18, 14))
        self.gaze = _direction(nod)
        self.brow = np.array([self.gaze[1], -self.gaze[0]])
        self.nose = self.head + self.gaze * (self.head_radius + varied(s.snout))
        self.eye = self.head + (0.35 * self.gaze + 0.3 * self.brow) * self.head_radius
        self.ear_width = varied(s.ear_width)
        self.ear_base = self.head + (0.7 * self.brow - 0.45 * self.gaze) * self.head_radius
        lean = math.radians(rng.normal(110, 12)) + nod
        self.ear = self.ear_base + _direction(lean) * varied(s.ear)
        self.tail_width = varied(s.tail_width)
        self.tail_base = self.hip + self.up * self.half * 0.55 - along * self.half * 0.75
        turn = math.radians(180 - s.tail_angle + rng.normal(0, 18))
        length = varied(s.tail)
        self.tail_middle = self.tail_base + _direction(turn) * length / 2
        self.tail_tip = self.tail_middle + _direction(turn + rng.normal(0, 0.35)) * length / 2

    def _leg(self, rng: np.random.Generator, joint: np.ndarray, length: float, bend: int) -> list[np.ndarray]:
        top = joint - self.up * self.half * 0.45
        swing = rng.normal(0, 0.28)
        fold = abs(rng.normal(0, 0.25)) * bend
        knee = top + _direction(-math.pi / 2 + swing) * (length + self.half * 0.5) / 2
        return [top, knee, knee + _direction(-math.pi / 2 + swing - fold) * (length + self.half * 0.3) / 2]

    def outline(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres [n, 2] and radii [n] of circles that contain everything that is drawn."""
        circles = [(self.hip, self.half), (self.shoulder, self.half), (self.head, self.head_radius)]
        circles += [(self.nose, self.head_radius * 0.5), (self.ear, self.ear_width / 2)]
        circles += [(self.tail_middle, self.tail_width / 2), (self.tail_tip, self.tail_width / 2)]
        circles += [(leg[2], self.leg_width * 0.6) for leg in self.legs]
        return np.stack([c for c, _ in circles]), np.array([r for _, r in circles])

    def keypoints(self) -> np.ndarray:
        """The keypoints, float64 [len(KEYPOINTS), 2], in that order."""
        middle = (self.hip + self.shoulder) / 2
        return np.stack([
            self.nose, self.eye, self.ear, self.shoulder + self.up * self.half,
            middle + self.up * self.half * 0.9, self.tail_base, self.tail_tip,
            middle - self.up * self.half * 0.9, self.legs[3][2], self.legs[1][2],
        ])  # fmt: skip


def _direction(angle: float) -> np.ndarray:
    """Unit vector at an angle above the horizontal, with y down."""
    return np.array([math.cos(angle), -math.sin(angle)])
