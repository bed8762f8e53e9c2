"""The reference: the unmodified diffusers transformer in float32, observed through hooks.

This file does not know how a block computes its modulation. It runs block k of the unmodified model on the
averaged hidden states with the massive channels discarded, and takes the input of the block's attention as
the feature: (1 + scale_k) * Norm_k(z) + shift_k, computed by diffusers.

The reference shares no arithmetic with the graph that it checks. A mistake in shared code would be in both
and would not be found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from ditf.calib.blocks import Entering
from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_model
from ditf.export.families.base import Condition, Family
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_noise import ReferenceNoise
from ditf.runtime.errors import MissingComponent


class _Stop(Exception):
    """Raised by a hook to end a forward pass once it has seen its tensors."""


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
        self._schedule = ReferenceNoise(checkpoint.config("scheduler"), flow_matching=not family.ddpm)
        self._block = _submodule(self._transformer, family.block_name(layer))
        self._attention = _submodule(self._block, family.attention_name)
        self._noise = noise
        self._size = size
        stride = self._latents.stride * family.patch_size
        self._grid = (size[0] // stride, size[1] // stride)
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._timestep = 0
        self._inputs: dict[str, Any] = {}
        self._block_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

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
                _submodule(self._transformer, self._family.block_name(index)).compile()
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
        x_t = self._placed(self._family.reference_latents(self._add_noise(x_0)))
        args, kwargs = _observe(self._block, self._transformer, (x_t,), self._inputs)
        self._block_call = (args, kwargs)
        z: np.ndarray = self._image_tokens(_first(args, kwargs)).mean(dim=0).float().numpy(force=True)
        return z

    @torch.no_grad()
    def trace(self, image: np.ndarray, visit: Callable[[int, Entering], None]) -> None:
        """Run the unmodified model once and visit its blocks; tokens are averaged over the ensemble.

        Args:
            image: uint8 [H, W, 3] at the export's size.
            visit: called with the index of each of blocks 0..k and the tokens that enter it, in order.
        """
        seen: list[tuple[np.ndarray, np.ndarray | None]] = []

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = _first(args, kwargs).mean(dim=0)
            text = kwargs.get("encoder_hidden_states") if self._family.text_stream else None
            image_tokens, others = self._family.reference_tokens(tokens, self._grid[0] * self._grid[1])
            own = others if text is None else text.mean(dim=0)
            seen.append((image_tokens.numpy(), own.numpy() if len(own) else None))

        def attending(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            modulated = self._image_tokens(_first(args, kwargs)).mean(dim=0).numpy()
            visit(layer, Entering(*seen.pop(), modulated))
            if layer == self._layer:
                raise _Stop

        handles = []
        for index in range(self._layer + 1):
            block = _submodule(self._transformer, self._family.block_name(index))
            attention = _submodule(block, self._family.attention_name)
            handles.append(block.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(
                attention.register_forward_pre_hook(
                    lambda module, args, kwargs, layer=index: attending(layer, args, kwargs), with_kwargs=True
                )
            )
        try:
            x_t = self._family.reference_latents(self._add_noise(self._encode(image)))
            self._transformer(x_t, **self._inputs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _image_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The image tokens of a sequence that may also hold text, as in FLUX's single-stream blocks."""
        return self._family.reference_tokens(tokens, self._grid[0] * self._grid[1])[0]

    @torch.no_grad()
    def features(self, hidden_states: np.ndarray, settings: FeatureSettings) -> np.ndarray:
        """Compute the DiTF feature, float32 [C, h, w], from the last result of `hidden_states`.

        Args:
            hidden_states: float32 [N, C].
            settings: the feature's definition.
        """
        channels = list(settings.channels)
        z = torch.from_numpy(hidden_states)[None].to(self._device, self._dtype, copy=True)
        if settings.stage == "before":
            z[:, :, channels] = 0.0
        if settings.adaln:
            args, kwargs = _replace_first(*_cut_batch(self._block_call, len(self._noise)), z)
            z = self._image_tokens(_first(*_observe(self._attention, self._block, args, kwargs)))
        if settings.stage == "after":
            z = z.clone()
            z[:, :, channels] = 0.0
        feature: np.ndarray = z[0].T.reshape(-1, *self._grid).float().numpy(force=True)
        return feature

    def _encode(self, image: np.ndarray) -> torch.Tensor:
        """x_0 [1, c, h', w']."""
        pixels = torch.from_numpy(image.copy()).to(self._device).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self._latents.encode(self._vae, pixels)

    def _add_noise(self, x_0: torch.Tensor) -> torch.Tensor:
        """x_t [E, c, h', w']."""
        return self._schedule.add(x_0.expand(len(self._noise), -1, -1, -1), self._noise, self._timestep)


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise MissingComponent(
            f"diffusers {diffusers.__version__} names the modules of {type(module).__name__} differently than"
            f" this ditf expects ({error})",
            "install a version that ditf was tested with: see constraints.txt",
        ) from error


def _observe(
    target: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run `model` until it calls `target`; returns the arguments of that call."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    handle = target.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(*args, **kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"{type(target).__name__} was not called by {type(model).__name__}")
    return seen[0]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor


def _replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (tensor, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": tensor}


def _cut_batch(
    call: tuple[tuple[Any, ...], dict[str, Any]], batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with a batch of one; the condition is the same for every noise of the ensemble."""

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, torch.Tensor) and len(value) == batch else value

    args, kwargs = call
    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}
