"""Hooks on an unmodified transformer: what enters its blocks, and the DiTF feature of one of them.

This file does not know how a block computes its modulation. It runs block k of the unmodified model on the
averaged hidden states with the massive channels discarded, and takes the input of the block's attention as
the feature: (1 + scale_k) * Norm_k(z) + shift_k, computed by diffusers.

Who makes a pass through the transformer, and with what inputs, is the caller's business: the reference
(`ditf.export.measure.reference_model`) calls the transformer itself, the oracle
(`ditf.export.measure.oracle`) lets its diffusers pipeline do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from ditf.calib.blocks import Entering
from ditf.export.families.base import Family
from ditf.export.graph.features import FeatureSettings
from ditf.runtime.errors import MissingComponent

Pass = Callable[[], Any]
"""Runs the transformer once, on one or more noises. The hooks end the pass once they have seen enough."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stop(Exception):
    """Raised by a hook to end a forward pass once it has seen its tensors."""


class Observation:
    """Observes block k of a transformer.

    Args:
        transformer: of the family's diffusers class.
        family: names the modules, and splits a sequence into image and text.
        layer: k, the block whose input is the feature.
        grid: (h, w) of the image in tokens.

    Raises:
        MissingComponent: the installed diffusers names the model's modules differently.
    """

    def __init__(self, transformer: Any, family: Family, layer: int, grid: tuple[int, int]) -> None:
        self._transformer = transformer
        self._family = family
        self._layer = layer
        self._grid = grid
        self._block = submodule(transformer, family.block_name(layer))
        self._attention = submodule(self._block, family.attention_name)
        self._call: _Call = ((), {})

    @torch.no_grad()
    def hidden_states(self, passes: Iterable[Pass]) -> np.ndarray:
        """What enters block k, averaged over all noises of all passes: float32 [N, C], in row-major order."""
        total, noises = torch.zeros(()), 0
        for run in passes:
            self._call = _observe(self._block, run)
            tokens = self._image_tokens(_first(*self._call))
            total, noises = total.to(tokens.device) + tokens.sum(dim=0), noises + len(tokens)
        z: np.ndarray = (total / noises).float().numpy(force=True)
        return z

    @torch.no_grad()
    def features(self, hidden_states: np.ndarray, settings: FeatureSettings) -> np.ndarray:
        """Compute the DiTF feature, float32 [C, h, w], under the condition of the last pass.

        Args:
            hidden_states: float32 [N, C], from `hidden_states`.
            settings: the feature's definition.
        """
        channels = list(settings.channels)
        z = torch.from_numpy(hidden_states)[None].to(_first(*self._call), copy=True)
        if settings.stage == "before":
            z[:, :, channels] = 0.0
        if settings.adaln:
            args, kwargs = _replace_first(*_first_of_batch(self._call), z)
            z = self._image_tokens(_first(*_observe(self._attention, lambda: self._block(*args, **kwargs))))
        if settings.stage == "after":
            z = z.clone()
            z[:, :, channels] = 0.0
        feature: np.ndarray = z[0].T.reshape(-1, *self._grid).float().numpy(force=True)
        return feature

    @torch.no_grad()
    def trace(self, run: Pass, visit: Callable[[int, Entering], None]) -> None:
        """Make one pass and visit the blocks; tokens are averaged over the noises of the pass.

        Args:
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
                raise Stop

        handles = []
        for index in range(self._layer + 1):
            block = submodule(self._transformer, self._family.block_name(index))
            attention = submodule(block, self._family.attention_name)
            handles.append(block.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(
                attention.register_forward_pre_hook(
                    lambda module, args, kwargs, layer=index: attending(layer, args, kwargs), with_kwargs=True
                )
            )
        try:
            run()
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def entering(self, passes: Iterable[Pass], rows: np.ndarray) -> np.ndarray:
        """What enters blocks 0..k at some tokens, averaged over all noises: float32 [k + 1, len(rows), C].

        Args:
            passes: each of as many noises as the others.
            rows: indices of image tokens.
        """
        traced: list[np.ndarray] = []
        for run in passes:
            seen: list[np.ndarray] = []
            self.trace(run, lambda layer, found, seen=seen: seen.append(found.image[rows]))  # type: ignore[misc]
            traced.append(np.stack(seen))
        return np.asarray(np.mean(traced, axis=0, dtype=np.float32))

    def _image_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The image tokens of a sequence that may also hold text, as in FLUX's single-stream blocks."""
        return self._family.reference_tokens(tokens, self._grid[0] * self._grid[1])[0]


def submodule(module: nn.Module, name: str) -> nn.Module:
    """A module inside another.

    Raises:
        MissingComponent: there is none of this name.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise MissingComponent(
            f"diffusers {diffusers.__version__} names the modules of {type(module).__name__} differently than"
            f" this ditf expects ({error})",
            "install a version that ditf was tested with: see constraints.txt",
        ) from error


def _observe(target: nn.Module, run: Pass) -> _Call:
    """Run until `target` is called; returns the arguments of that call."""
    seen: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Stop

    handle = target.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except Stop:
        pass
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"{type(target).__name__} was not called")
    return seen[0]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor


def _replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], tensor: torch.Tensor) -> _Call:
    if args:
        return (tensor, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": tensor}


def _first_of_batch(call: _Call) -> _Call:
    """The same call with a batch of one; the condition is the same for every noise of the ensemble."""
    args, kwargs = call
    batch = len(_first(args, kwargs))

    def cut(value: Any) -> Any:
        tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        return value[:1] if tensor and len(value) == batch else value

    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}
