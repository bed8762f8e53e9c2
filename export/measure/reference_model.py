"""The reference: the unmodified diffusers transformer in float32, called by ditf and observed through hooks.

Its weights are read when they are used, so it runs where the whole model does not fit into memory. It shares
no arithmetic with the graph that it checks, but it shares what goes in: text embeddings, latents and tensors
are read by the same code. The oracle (`ditf.export.measure.oracle`) shares none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from ditf.calib.blocks import Entering
from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_model
from ditf.export.families.base import Condition, Family
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.observation import Observation, submodule
from ditf.export.measure.scheduler_noise import SchedulerNoise


class Reference:
    """The unmodified model at one layer and size, under one condition at a time.

    Args:
        checkpoint: a diffusers directory.
        family: the family of its transformer.
        layer: k, the block whose input is the feature.
        size: (H, W) of the images in pixels.
        noise: eps, float32 [E, c, h, w].
        latents: the latent space and its encoder; the checkpoint's own VAE by default.
        resident: hold the whole model in memory, which `moved` needs. Otherwise the weights of a large model
            are read in every pass when they are used, up to block k.

    Raises:
        InputError: weights are missing, damaged or do not belong to the config.
        MissingComponent: the installed diffusers names the model's modules differently.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        layer: int,
        size: tuple[int, int],
        noise: torch.Tensor,
        latents: LatentSpace | None = None,
        resident: bool = False,
    ) -> None:
        transformer_class = getattr(diffusers, family.transformer_class)
        self._family = family
        self._layer = layer
        self._transformer = load_model(transformer_class, checkpoint, "transformer", resident)
        self._latents = latents or LatentSpace.of(checkpoint, family.latent_channels, family.shifts_latents)
        self._vae = self._latents.load_vae() if self._latents.vae else None
        self._schedule = SchedulerNoise(checkpoint.config("scheduler"), flow_matching=not family.ddpm)
        self._noise = noise
        self._size = size
        stride = self._latents.stride * family.patch_size
        self._grid = (size[0] // stride, size[1] // stride)
        self._observation = Observation(self._transformer, family, layer, self._grid)
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._timestep = 0
        self._inputs: dict[str, Any] = {}

    def under(self, condition: Condition, timestep: int) -> Reference:
        """Set the condition and the timestep of the passes that follow; returns this object."""
        self._timestep = timestep
        inputs = self._family.reference_inputs(condition, timestep, self._size, self._grid, len(self._noise))
        self._inputs = {name: self._placed(value) for name, value in inputs.items()}
        return self

    def _placed(self, value: Any) -> Any:
        """Move an input to the transformer's device; embeddings are cast to the transformer's type."""
        if isinstance(value, dict):
            return {name: self._placed(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._placed(one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        wide = value.is_floating_point() and value.ndim > 1
        return value.to(self._device, self._dtype if wide else value.dtype)

    def moved(self, device: str, dtype: torch.dtype, compiled: bool = False) -> Reference:
        """Move a resident model to another device or type, to time it there; returns this object.

        Its outputs are no reference any more.

        Args:
            device: "cpu" or "cuda".
            dtype: of the weights and activations.
            compiled: compile the blocks before k with torch.compile.
        """
        self._device, self._dtype = torch.device(device), dtype
        self._transformer.to(self._device, dtype)
        if self._vae is not None:
            self._vae.to(self._device, dtype)
        self._noise = self._noise.to(self._device)
        if compiled:
            for index in range(self._layer):
                submodule(self._transformer, self._family.block_name(index)).compile()
        return self

    @torch.no_grad()
    def hidden_states(self, image: np.ndarray) -> np.ndarray:
        """What enters block k, averaged over the noise ensemble: float32 [N, C], in row-major order.

        Args:
            image: uint8 [H, W, 3] at the export's size.
        """
        return self.hidden_states_of(self._encode(image))

    @torch.no_grad()
    def hidden_states_of(self, x_0: torch.Tensor) -> np.ndarray:
        """The same as `hidden_states` for an encoded image, x_0 float32 [1, c, h', w']."""
        return self._observation.hidden_states([lambda: self._pass(x_0)])

    @torch.no_grad()
    def trace(self, image: np.ndarray, visit: Callable[[int, Entering], None]) -> None:
        """Run the unmodified model once and visit its blocks; tokens are averaged over the ensemble.

        Args:
            image: uint8 [H, W, 3] at the export's size.
            visit: called with the index of each of blocks 0..k and the tokens that enter it, in order.
        """
        x_0 = self._encode(image)
        self._observation.trace(lambda: self._pass(x_0), visit)

    def entering(self, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What enters blocks 0..k at some image tokens, averaged over the ensemble: float32 [k + 1, R, C].

        Args:
            image: uint8 [H, W, 3] at the export's size.
            rows: indices [R] of image tokens.
        """
        x_0 = self._encode(image)
        return self._observation.entering([lambda: self._pass(x_0)], rows)

    def features(self, hidden_states: np.ndarray, settings: FeatureSettings) -> np.ndarray:
        """Compute the DiTF feature, float32 [C, h, w], from the last result of `hidden_states`.

        Args:
            hidden_states: float32 [N, C].
            settings: the feature's definition.
        """
        return self._observation.features(hidden_states, settings)

    def _pass(self, x_0: torch.Tensor) -> None:
        """Run the transformer on all noises of the ensemble at once."""
        x_t = self._placed(self._family.reference_latents(self._add_noise(x_0)))
        self._transformer(x_t, **self._inputs)

    @torch.no_grad()
    def _encode(self, image: np.ndarray) -> torch.Tensor:
        """x_0 [1, c, h', w']."""
        pixels = torch.from_numpy(image.copy()).to(self._device).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self._latents.encode(self._vae, pixels)

    def _add_noise(self, x_0: torch.Tensor) -> torch.Tensor:
        """x_t [E, c, h', w']."""
        return self._schedule.add(x_0.expand(len(self._noise), -1, -1, -1), self._noise, self._timestep)
