"""Weights with LoRAs folded in: a tensor is changed when it is read, in float32."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditf.export.checkpoints.formats.lora.file import LoraFile, Part
from ditf.export.checkpoints.formats.lora.given import Lora
from ditf.export.checkpoints.formats.lora.layout import Placed, component_of, place
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one tensor: `factor * B @ A`, or `factor * B` where A is None.

    Attributes:
        key: of B in the file, [out, rank], or of a difference of the tensor's shape.
        down: the key of A, [rank, in].
        rows: the rows of B that are added; None for all.
        magnitude: the key of the lengths that the rows of the sum get (DoRA), [out]; None to leave them.
    """

    key: str
    factor: float
    down: str | None = None
    rows: torch.Tensor | None = None
    magnitude: str | None = None


class LoraWeights(Weights):
    """The tensors of another object, changed as `fuse_lora` of diffusers changes them.

    Args:
        base: the model's own.
        loras: in the order in which they are folded.
        component: "transformer" or a text encoder.
        encoders: the names of the model's text encoders.
        model: the class of the transformer.

    Attributes:
        changed: for each LoRA, the names of the tensors that it changes.

    Raises:
        InputError: a file cannot be read or holds something else, or a tensor in it does not fit the model.
    """

    def __init__(
        self, base: Weights, loras: Sequence[Lora], component: str, encoders: Sequence[str], model: str
    ) -> None:
        super().__init__(base.shapes, base.bytes_of, base.dtypes)
        self._base = base
        self._loras = loras
        self._files = [LoraFile(lora.path) for lora in loras]
        self._changes: list[dict[str, list[Change]]] = []
        for lora, file in zip(loras, self._files, strict=True):
            placed = place(file, component, encoders, base.shapes, model)
            self._changes.append(self._tensors(lora, file, component, placed))

    @property
    def changed(self) -> list[set[str]]:
        return [set(changes) for changes in self._changes]

    def source(self, name: str) -> str:
        pairs = zip(self._loras, self._changes, strict=True)
        return " with ".join([self._base.source(name), *(str(a.path) for a, b in pairs if name in b)])

    def fingerprint(self) -> str:
        """A hash of that of the unchanged weights, of the LoRA files that change them and of their scales."""
        digest = hashlib.sha256(self._base.fingerprint().encode())
        for lora, changes in zip(self._loras, self._changes, strict=True):
            if changes:
                digest.update(f"{lora.digest} {lora.scale!r}".encode())
        return digest.hexdigest()[:16] if any(self._changes) else self._base.fingerprint()

    def _load(self, name: str) -> torch.Tensor:
        tensor = base = self._base._load(name)  # `tensor` checks the sum
        for file, changes in zip(self._files, self._changes, strict=True):
            for change in changes.get(name, ()):
                tensor = _changed(tensor, base, file, change)
        return tensor

    def _tensors(
        self, lora: Lora, file: LoraFile, component: str, placed: Sequence[Placed]
    ) -> dict[str, list[Change]]:
        """The changes of each tensor; checks that all have the tensor's shape."""
        changes: dict[str, list[Change]] = {}
        for one in placed:
            part, rows = one.part, one.rows
            weight, bias = f"{one.module}.weight", f"{one.module}.bias"
            if part.magnitude is not None and (part.up is None or not _is_whole(file, one)):
                raise InputError(
                    f"{part.magnitude} of --lora {lora.path} belongs to a part of a fused matrix",
                    "save the LoRA in diffusers' or PEFT's layout",
                )
            if part.up is not None:
                factor = lora.scale * file.factor(part, component, one.module)
                change = Change(part.up, factor, part.down, rows, part.magnitude)
                changes.setdefault(weight, []).append(change)
                if part.up_bias is not None:
                    changes.setdefault(bias, []).append(Change(part.up_bias, factor, rows=rows))
            if part.difference is not None:
                changes.setdefault(weight, []).append(Change(part.difference, lora.scale, rows=rows))
            if part.bias_difference is not None:
                changes.setdefault(bias, []).append(Change(part.bias_difference, lora.scale, rows=rows))
        for name, ones in changes.items():
            for change in ones:
                self._check_fits(lora, file, name, change)
        return changes

    def _check_fits(self, lora: Lora, file: LoraFile, name: str, change: Change) -> None:
        given = _shape(file, change)
        there = self.shapes.get(name)
        same = there is not None and (there == given or (change.down and _matrix(there) == _matrix(given)))
        if same and change.magnitude is not None:
            same = math.prod(file.tensors.shapes[change.magnitude]) == given[0]
        if same:
            return
        if name.endswith("x_embedder.weight") and there and _matrix(given)[1] > _matrix(there)[1]:
            raise InputError(
                f"--lora {lora.path} is a control LoRA: it widens {name} from {list(there)} to {list(given)}",
                "control LoRAs read a second image, which ditf does not have: pass another one",
            )
        has = "does not have" if there is None else f"has as {list(there)}"
        raise InputError(
            f"{change.key} of --lora {lora.path} does not fit: it is {list(given)} for {name}, which this"
            f" model {has}",
            "pass a LoRA of this model",
        )


def check_components(lora: Lora, encoders: Sequence[str], unneeded: tuple[str, ...]) -> None:
    """Check that a LoRA changes only components that the model has.

    Args:
        encoders: the names of the model's text encoders.
        unneeded: prefixes of the names of components that are not run; what changes them is not looked at.

    Raises:
        InputError: the file cannot be read or holds something else, or it changes a component that the model
            does not have.
    """
    file = LoraFile(lora.path)
    for part in file.parts.values():
        component = component_of(part.module, encoders)[0]
        known = component in ("transformer", *encoders) or component.startswith(unneeded or ("\0",))
        if not known and not file.is_zero(part):
            raise InputError(
                f"{part.key} of --lora {lora.path} changes {component}, which this model does not have",
                "pass a LoRA of this model",
            )


def changes_text(lora: Lora, encoders: Sequence[str]) -> bool:
    """Whether a LoRA changes a text encoder.

    Args:
        encoders: the names of the model's text encoders.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    file = LoraFile(lora.path)
    parts = [part for part in file.parts.values() if component_of(part.module, encoders)[0] != "transformer"]
    return not all(map(file.is_zero, parts))


def _changed(tensor: torch.Tensor, base: torch.Tensor, file: LoraFile, change: Change) -> torch.Tensor:
    """A tensor with one more change; `base` is the tensor without any."""
    added = file.read(change.key)
    if change.rows is not None:
        added = added[change.rows]
    if change.down is None:
        return tensor + change.factor * added.reshape(tensor.shape)
    up, down = added.flatten(1), file.read(change.down).flatten(1)
    made = torch.addmm(tensor.flatten(1), up, down, alpha=change.factor)
    if change.magnitude is not None:
        # PEFT measures the rows without what other LoRAs add to them.
        alone = made if base is tensor else torch.addmm(base.flatten(1), up, down, alpha=change.factor)
        lengths = file.read(change.magnitude).reshape(-1, 1)
        made = made * (lengths / torch.linalg.vector_norm(alone, dim=1, keepdim=True))
    return made.reshape(tensor.shape)


def _shape(file: LoraFile, change: Change) -> tuple[int, ...]:
    """The shape of what a change adds."""
    shapes: Mapping[str, tuple[int, ...]] = file.tensors.shapes
    rows = shapes[change.key][0] if change.rows is None else len(change.rows)
    rest = shapes[change.key] if change.down is None else shapes[change.down]
    return (rows, *rest[1:])


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a weight as a matrix: a convolution multiplies its patches."""
    return shape[0], math.prod(shape[1:])


def _is_whole(file: LoraFile, placed: Placed) -> bool:
    part: Part = placed.part
    assert part.up is not None
    rows = placed.rows
    return rows is None or torch.equal(rows, torch.arange(file.tensors.shapes[part.up][0]))
