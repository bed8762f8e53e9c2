"""The oracle: the features that a checkpoint's own pipeline gives, under every condition of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.observation import Observation, Pass
from ditf.export.measure.oracle.own_pipeline import OwnPipeline
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan


class Oracle:
    """The unmodified pipeline of a checkpoint, observed at one layer and size.

    Args:
        plan: of the export that is judged: layer, size, seed, ensemble and --text-tokens are taken from it.
        own: the checkpoint's pipeline.

    Attributes:
        record: of the pipeline's parts.
    """

    def __init__(self, plan: Plan, own: OwnPipeline) -> None:
        self._own = own
        self._options = plan.options
        self._observation = Observation(own.transformer, plan.family, plan.layer, plan.grid)
        self.record = own.record

    def maps(
        self, entry: Entry, images: np.ndarray, settings: FeatureSettings, whole: bool = False
    ) -> list[np.ndarray]:
        """The features of images under a condition, each float32 [C, h, w].

        Args:
            entry: one of those that the pipeline was made for.
            images: uint8 [n, H, W, 3].
            settings: the feature's definition.
            whole: with all text tokens and the checkpoint's own VAE, whatever the bundle has.
        """
        maps = []
        for image in images:
            hidden_states = self._observation.hidden_states(self._passes(entry, image, whole))
            maps.append(self._observation.features(hidden_states, settings))
        return maps

    def entering(self, entry: Entry, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What enters blocks 0..k at some image tokens: float32 [k + 1, len(rows), C]."""
        return self._observation.entering(self._passes(entry, image, whole=False), rows)

    def _passes(self, entry: Entry, image: np.ndarray, whole: bool) -> Iterator[Pass]:
        """One pass for each noise of the ensemble."""
        x_0 = self._own.x_0(image, whole)
        generator = torch.Generator().manual_seed(self._options.seed)
        noise = torch.randn((self._options.ensemble, *x_0.shape[1:]), generator=generator)
        tokens = None if whole else self._options.text_tokens
        for eps in noise.split(1):
            x_t = self._own.add_noise(x_0, eps, entry.timestep)
            yield partial(self._own.run, x_t, entry, tokens)
