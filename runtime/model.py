"""Model: an opened bundle, which turns images into feature maps, and feature maps into matches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Union

import numpy as np

from ditf.runtime import backends
from ditf.runtime.backends.engine_records import IMAGE_SIDES
from ditf.runtime.bundles.bundle import FEATURES, MATCH, Bundle
from ditf.runtime.bundles.conditions import Feeds
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.bundles.signing import Trust
from ditf.runtime.errors import BundleError, InputError, NoPlan
from ditf.runtime.features import FeatureMap, Resident
from ditf.runtime.features_runner import FeaturesRunner
from ditf.runtime.images import FITS, FittedImage, ImageLike, fitted_image
from ditf.runtime.matching.flow import Flow, dense_flow
from ditf.runtime.matching.match_graph import run_match_graph
from ditf.runtime.matching.mutual import MutualMatches, mutual_matches
from ditf.runtime.matching.points import Matches, PointMatcher, PointsLike, heat_map
from ditf.runtime.matching.soft_argmax import SIGMA, TEMPERATURE, WINDOW, check_method
from ditf.runtime.tracking import Tracker

logger = logging.getLogger(__name__)


def load(
    bundle: Union[str, Path],
    backend: str = "auto",
    fit: str = "stretch",
    *,
    device: str | None = None,
    require_signature: Union[str, Path, None] = None,
    allow_host_code: bool = False,
) -> Model:
    """Open a bundle on this machine.

    Args:
        bundle: a directory written by ditf-export.
        backend: "auto", or the name of a backend, which must then be available.
        fit: how images are fitted to the engine's size: "stretch", or "pad", which keeps the aspect ratio.
        device: "cuda" or "cuda:N" for a GPU, numbered as CUDA_VISIBLE_DEVICES leaves them, or "cpu". By
            default it is the first GPU, and the CPU where ONNX Runtime cannot use that.
        require_signature: a file of OpenSSH public keys. One of them must have signed the bundle and the
            engine that is opened; see `ditf sign`.
        allow_host_code: accept a version-compatible TensorRT engine, which runs code of its own on the CPU.

    Raises:
        DitfError: the bundle is missing, altered or not signed as required, no backend runs it, there is no
            such device, or `fit` is unknown.
    """
    trust = Trust(None if require_signature is None else Path(require_signature), allow_host_code)
    return Model(Bundle.open(bundle, trust), backend, fit, device)


class Model:
    """An opened bundle. `load` makes one; as a context manager it closes itself.

    Attributes:
        bundle, manifest: what was opened.
        backend: the name of the backend that runs it.
        reason: why that backend was chosen.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str | backends.Backend = "auto",
        fit: str = "stretch",
        device: str | None = None,
    ) -> None:
        if fit not in FITS:
            raise InputError(f"unknown fit {fit!r}", f"choose one of {', '.join(FITS)}")
        self.bundle = bundle
        self.fit = fit
        opened = backends.open_features(bundle, backend, device)
        self.backend, self._opened_by, self.reason = opened.name, opened.backend, opened.reason
        self._features = opened.features
        self._runner = FeaturesRunner(bundle, self._features)
        if "features" not in self._features.outputs:
            raise BundleError(f"{bundle.path}: {FEATURES} gives no features", "export the bundle again")
        self._match: backends.Session | None = None
        self._opening = threading.Lock()
        self._closed = False
        logger.info("%s on %s: %s (%s)", bundle.path, self.backend, self.detail, self.reason)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def detail(self) -> str:
        """The version of the backend and the device that run the graph."""
        return self._features.detail

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prompt` can have, the default first."""
        return self._runner.conditions

    def features(
        self,
        image: ImageLike,
        noise: np.ndarray | None = None,
        prompt: str | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> FeatureMap:
        """Compute the features of one image.

        Args:
            image: a path, a PIL image, or an RGB uint8 array [H, W, 3] of any size. The docstring of
                `ditf.runtime.images` has the rules for orientation, animations and bit depth.
            noise: float32 [ensemble, c, h, w], for a bundle exported with --noise input. The default is the
                bundle's own noise.
            prompt: one of `conditions`, for a bundle exported with several.
            embeddings: inputs such as `prompt_embeds` and `timestep` that replace those of `prompt`, for a
                bundle exported with --conditioning live. `ditf inspect` lists their types and shapes.

        Raises:
            InputError: the image cannot be read, or the graph does not take this noise or condition.
        """
        return self.features_of([image], noise, prompt, embeddings)[0]

    def features_of(
        self,
        images: Sequence[ImageLike],
        noise: np.ndarray | None = None,
        prompt: str | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> list[FeatureMap]:
        """Compute the features of several images, in batches of the bundle's size; see `features`."""
        if isinstance(images, (str, Path)):
            raise InputError(f"features_of takes several images, not {str(images)!r}", "pass a list")
        fitted = [self.fitted(image) for image in images]
        return self.features_of_fitted(fitted, self._runner.feeds(noise, prompt, embeddings))

    def fitted(self, image: ImageLike) -> FittedImage:
        """Fit an image to the engine's size, for `features_of_fitted`. Any thread may call this.

        Raises:
            InputError: the image cannot be read.
        """
        return fitted_image(image, self.manifest.size, self.fit)

    def features_of_fitted(self, images: Sequence[FittedImage], feeds: Feeds) -> list[FeatureMap]:
        """Compute the features of several images, in batches of the bundle's size.

        Args:
            images: results of `fitted`.
            feeds: the result of `feeds`.
        """
        if not images:
            return []
        maps = self._runner.maps(np.stack([image.pixels for image in images]), feeds)
        return [
            _crop(array, image.covered, self.manifest.size, image.image_size)
            for array, image in zip(maps, images, strict=True)
        ]

    @property
    def largest_batch(self) -> int | None:
        """The most images that one call of the engine takes; None if there is no limit."""
        return self._runner.largest_batch

    def run(
        self,
        pixels: np.ndarray,
        noise: np.ndarray | None = None,
        prompt: str | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Run the features graph itself.

        Args:
            pixels: uint8 [n, H, W, 3] at the bundle's size, any n >= 1.
            noise, prompt, embeddings: see `features`.

        Returns:
            [n, C, h, w], float16 or float32 as the bundle was exported.
        """
        return self._runner.run(pixels, noise, prompt, embeddings)

    def feeds(self, prompt: str | None = None) -> Feeds:
        """The graph's inputs beside the images, for `maps` and `features_of_fitted`; see `features`."""
        return self._runner.feeds(None, prompt)

    def maps(self, pixels: np.ndarray, feeds: Feeds) -> Iterator[np.ndarray | Resident]:
        """Compute features [C, h, w] of each image; they stay where the backend leaves them.

        Args:
            pixels: uint8 [n, H, W, 3] at the bundle's size.
            feeds: the result of `feeds`.
        """
        return self._runner.maps(pixels, feeds)

    def device_seconds(self) -> float | None:
        """The seconds that the last features took by the device's own clock; None if it has none."""
        return self._features.device_seconds

    def device_bytes(self) -> int | None:
        """The bytes of device memory that the sessions hold; None if that is not known."""
        held = [one.device_bytes for one in (self._features, self._match) if one is not None]
        known = [count for count in held if count is not None]
        return sum(known) if known else None

    def match(
        self,
        source: FeatureMap,
        target: FeatureMap,
        points: PointsLike,
        method: str = "argmax",
        window: int = WINDOW,
        temperature: float = TEMPERATURE,
        sigma: float = SIGMA,
    ) -> Matches:
        """Find each source point in the target, by default at the pixel of the highest cosine.

        See `match_points`. With "argmax", maps in device memory are matched on the device.
        """
        return self.matcher(source, target, method, window, temperature, sigma)(points)

    def matcher(
        self,
        source: FeatureMap,
        target: FeatureMap,
        method: str = "argmax",
        window: int = WINDOW,
        temperature: float = TEMPERATURE,
        sigma: float = SIGMA,
    ) -> Callable[[PointsLike], Matches]:
        """A function that matches points as `match` does. Its calls may be spread out; see `PointMatcher`."""
        check_method(method, window, temperature, sigma)
        there = source.resident is not None and target.resident is not None
        if method == "argmax" and there and self._matches_there(target):
            return lambda points: self.match_with_graph(source, target, points)
        return PointMatcher(source, target, method, window, temperature, sigma)

    def mutual(
        self,
        source: FeatureMap,
        target: FeatureMap,
        max_matches: int | None = None,
        ratio: float | None = None,
        step: int | None = None,
        refine: str | None = None,
    ) -> MutualMatches:
        """Find the dense mutual nearest neighbours of two maps; see `mutual_matches`."""
        return mutual_matches(source, target, max_matches, ratio, step, refine)

    def flow(self, source: FeatureMap, target: FeatureMap, method: str = "argmax") -> Flow:
        """Find every source pixel in the target; see `dense_flow`."""
        return dense_flow(source, target, method)

    def heat_map(
        self, source: FeatureMap, target: FeatureMap, point: Sequence[float] | np.ndarray
    ) -> np.ndarray:
        """The cosine of one source point with every target pixel, float32 [H, W]; see `points.heat_map`."""
        return heat_map(source, target, point)

    def track(self, source: ImageLike, points: PointsLike, prompt: str | None = None) -> Tracker:
        """Follow points of an image through a video.

        Args:
            source: the image that the points are in; see `features`.
            points: [N, 2], (x, y) in the source's own pixels.
            prompt: see `features`.

        Raises:
            InputError: the image cannot be read, or the points are bad.
        """
        return Tracker(self, source, points, prompt)

    def match_with_graph(self, source: FeatureMap, target: FeatureMap, points: PointsLike) -> Matches:
        """Match points with match.onnx on this backend; see `match`.

        Raises:
            NoPlan: the engine was built without match.onnx.
        """
        return run_match_graph(self._match_session(), self.manifest.grid, source, target, points)

    def _matches_there(self, target: FeatureMap) -> bool:
        """Whether the backend has a plan of match.onnx for images of this size."""
        try:
            self._match_session()
        except NoPlan:
            return False
        return max(target.image_size) <= IMAGE_SIDES[-1]

    def _match_session(self) -> backends.Session:
        with self._opening:
            if self._closed:
                raise RuntimeError("the model is closed")
            if self._match is None:
                self._match = self._opened_by.open_session(self.bundle, MATCH)
            return self._match

    def close(self) -> None:
        """Free the sessions. The model must not be used afterwards."""
        self._closed = True
        self._features.close()
        if self._match is not None:
            self._match.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _crop(
    array: np.ndarray | Resident, covered: tuple[int, int], engine: tuple[int, int], size: tuple[int, int]
) -> FeatureMap:
    """Cut a map to the part that the image covers. A map in device memory stays whole.

    Args:
        array: [C, h, w].
        covered: the rows and columns of the engine's input that the image covers.
        engine: (H, W) of the engine's input.
        size: (H, W) of the original image.
    """
    _, h, w = array.shape
    extent = (h * covered[0] / engine[0], w * covered[1] / engine[1])
    if not isinstance(array, np.ndarray):
        return FeatureMap(array, size, extent)
    # Integers, because in floats h * (rows / H) can round up into the padding.
    rows, columns = -(-h * covered[0] // engine[0]), -(-w * covered[1] // engine[1])
    return FeatureMap(np.ascontiguousarray(array[:, :rows, :columns]), size, extent)
