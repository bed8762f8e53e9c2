"""Following points of one image through the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ditf.runtime.features import FeatureMap
from ditf.runtime.images import ImageLike
from ditf.runtime.matching.points import Matches, PointsLike, check_points


class Matcher(Protocol):
    """What a tracker needs from a model."""

    def features(self, image: ImageLike, *, prompt: str | None = None) -> FeatureMap: ...

    def features_of(self, images: Sequence[ImageLike], *, prompt: str | None = None) -> list[FeatureMap]: ...

    def match(self, source: FeatureMap, target: FeatureMap, points: PointsLike) -> Matches: ...


class Tracker:
    """Finds the points of a source image in frame after frame; `Model.track` makes one.

    The source's features are computed once. Every frame is matched against the source and not against the
    frame before, so that errors do not add up.

    Attributes:
        points: float64 [N, 2], (x, y) in the source image's pixels.
    """

    def __init__(self, model: Matcher, source: ImageLike, points: PointsLike, prompt: str | None) -> None:
        self._model = model
        self._prompt = prompt
        self._source = model.features(source, prompt=prompt)
        self.points = check_points(points, self._source.image_size)

    def update(self, frame: ImageLike) -> Matches:
        """Find the points in a frame; the matches are in the frame's own pixels.

        Raises:
            InputError: the frame cannot be read.
        """
        return self.update_all([frame])[0]

    def update_all(self, frames: Sequence[ImageLike]) -> list[Matches]:
        """Find the points in several frames, whose features are computed in batches of the bundle's size."""
        maps = self._model.features_of(frames, prompt=self._prompt)
        return [self._model.match(self._source, target, self.points) for target in maps]
