"""Running a features graph: cutting images into batches, and feeding noise and conditions with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ditf.runtime.bundles.bundle import FEATURES, NOISE, Bundle
from ditf.runtime.bundles.conditions import Conditions, Feeds
from ditf.runtime.errors import BundleError, InputError


class FeaturesSession(Protocol):
    """What a runner needs from an opened features.onnx."""

    @property
    def inputs(self) -> Mapping[str, tuple[int | None, ...]]:
        """{name: shape} of the inputs; a dynamic dimension is None."""

    @property
    def outputs(self) -> Mapping[str, tuple[int | None, ...]]:
        """{name: shape} of the outputs."""

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """(smallest, largest) batch of each profile; see `ditf.runtime.backends.Session`."""

    def run(self, feeds: Mapping[str, np.ndarray], keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the graph and return its outputs by name; see `ditf.runtime.backends.Session`."""


class FeaturesRunner:
    """A bundle's features graph in an open session.

    Attributes:
        conditions: the names of the conditions, the default first.

    Raises:
        BundleError: the graph's inputs or outputs contradict the manifest.
    """

    def __init__(self, bundle: Bundle, session: FeaturesSession) -> None:
        manifest = bundle.manifest
        self._ranges = session.batches if manifest.batch == "dynamic" else ((manifest.batch, manifest.batch),)
        self._session = session
        batch = None if manifest.batch == "dynamic" else manifest.batch
        if session.inputs.get("image") != (batch, *manifest.size, 3):
            raise BundleError(
                f"{bundle.path}: {FEATURES} takes {dict(session.inputs)}, its manifest says otherwise",
                "export the bundle again",
            )
        self._check_features(bundle, (batch, manifest.channels, *manifest.grid))
        self._conditions = Conditions(bundle, session.inputs)
        self.conditions = self._conditions.names
        self._noise = bundle.read_array(NOISE) if manifest.noise == "input" else None

    def _check_features(self, bundle: Bundle, expected: tuple[int | None, ...]) -> None:
        """Compare the shape of the output `features` with the manifest, if the graph has that output."""
        found = self._session.outputs.get("features", expected)
        unlike = any(None not in pair and pair[0] != pair[1] for pair in zip(found, expected, strict=False))
        if unlike or len(found) != len(expected):
            raise BundleError(
                f"{bundle.path}: {FEATURES} gives features of {list(found)}, its manifest says"
                f" {list(expected)}",
                "export the bundle again",
            )

    @property
    def largest_batch(self) -> int | None:
        """The most images that one call takes; None if there is no limit."""
        return max((high for _, high in self._ranges), default=None)

    def feeds(
        self,
        noise: np.ndarray | None = None,
        prompt: str | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> Feeds:
        """The graph's inputs beside the image; see `Model.features`."""
        return {**self._noise_feed(noise), **self._conditions.feeds(prompt, embeddings)}

    def batches(self, pixels: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Cut images [n, H, W, 3] into batches that the graph takes.

        A batch that is too small is filled up by repeating its last image.

        Yields:
            A batch, and the number of its images that were asked for.
        """
        start = 0
        for wanted, size in split(len(pixels), self._ranges):
            chunk = pixels[start : start + wanted]
            start += wanted
            if size > wanted:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], size - wanted, axis=0)])
            yield chunk, wanted

    def run(
        self,
        pixels: np.ndarray,
        noise: np.ndarray | None = None,
        prompt: str | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Compute features [n, C, h, w] of uint8 images [n, H, W, 3]; see `Model.run`."""
        feeds = self.feeds(noise, prompt, embeddings)
        chunks = [
            self._session.run({"image": chunk, **feeds})["features"][:wanted]
            for chunk, wanted in self.batches(pixels)
        ]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def maps(self, pixels: np.ndarray, feeds: Feeds) -> Iterator[Any]:
        """Compute features [C, h, w] of each image; they stay in the memory where the session leaves them.

        Args:
            pixels: uint8 [n, H, W, 3].
            feeds: the result of `feeds`.
        """
        for chunk, wanted in self.batches(pixels):
            array = self._session.run({"image": chunk, **feeds}, keep=("features",))["features"]
            for index in range(wanted):
                yield array[index]

    def _noise_feed(self, noise: np.ndarray | None) -> Feeds:
        if self._noise is None:
            if noise is not None:
                raise InputError("this bundle's noise is baked in", "export it with --noise input")
            return {}
        if noise is None:
            return {"noise": self._noise}
        if noise.shape != self._noise.shape or noise.dtype != np.float32:
            raise InputError(
                f"noise must be float32 {list(self._noise.shape)}, got {noise.dtype} {list(noise.shape)}"
            )
        if not np.isfinite(noise).all():
            raise InputError("the noise holds NaN or infinity")
        return {"noise": noise}


def split(count: int, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut a number of images into batches that an engine takes.

    Args:
        ranges: (smallest, largest) batch of each profile; empty if any batch will do.

    Yields:
        The number of images in a batch, which is as large as possible, and the size it is filled up to.
    """
    if not ranges:
        yield count, count
        return
    largest = max(high for _, high in ranges)
    while count:
        wanted = min(count, largest)
        size = min(max(wanted, low) for low, high in ranges if high >= wanted)
        yield wanted, size
        count -= wanted
