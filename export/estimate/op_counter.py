"""Counts the FLOPs and the memory of a module while it runs on tensors without values.

A multiply-add counts as two operations. Matrix products, convolutions and attention count, and nothing else
does, as in torch.utils.flop_counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ditf.export.checkpoints.loading import first_line
from ditf.runtime.errors import InputError

_SOFTMAX = (torch.ops.aten._softmax, torch.ops.aten._safe_softmax)
_BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
        path: the path of the module that computes it; module: that module.
        batched: whether both operands are activations, as in attention.
        kind: type of the operands, such as "float16".
        operations: two for a multiply-add.
        moved: bytes of operands and result, each counted once. Logits of attention stay on the chip, as in a
            fused kernel.
    """

    path: str
    module: nn.Module
    batched: bool
    kind: str
    operations: int
    moved: int


class OpCount(TorchDispatchMode):
    """The products and the storage of one run of a module.

    Args:
        module: the module; its parameters are no activations.
        inputs: what it is called with; they are held from the start.

    Attributes:
        products: in the order in which they are computed.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._where: list[tuple[str, nn.Module]] = [("", module)]
        self._constant = {
            tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())
        }
        self._kept: list[Any] = []  # a storage that is freed would give its address to another
        self._size: dict[int, int] = {}
        self._born: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._weights: set[int] = set()  # storages of attention weights: what a softmax gave
        self._step = 0
        for tensor in inputs:
            self._touch(tensor)

    def peak_bytes(self) -> int:
        """The most bytes that live at once; a value lives from the call that makes it to its last reader."""
        change: Counter[int] = Counter()
        for key, size in self._size.items():
            change[self._born[key]] += size
            change[self._last[key] + 1] -= size
        alive = peak = 0
        for step in sorted(change):
            alive += change[step]
            peak = max(peak, alive)
        return peak

    @contextmanager
    def following(self) -> Iterator[None]:
        """Notes which submodule computes, while the module is called."""
        handles = []
        for path, module in self._where[0][1].named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._where.append((path, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._where.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self._step += 1
        for tensor in (*read, *made):
            self._touch(tensor)
        packet = func._overloadpacket
        if packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=output)
            self._record(packet, operations, read, made)
        elif packet in _SOFTMAX or any(_key(tensor) in self._weights for tensor in read):
            self._weights.update(map(_key, made))
        return output

    def _touch(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        if key in self._constant:
            return
        if key not in self._size:
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            self._size[key] = storage.nbytes()
            self._born[key] = self._step
        self._last[key] = self._step

    def _record(
        self, packet: Any, operations: int, read: list[torch.Tensor], made: list[torch.Tensor]
    ) -> None:
        path, module = self._where[-1]
        batched = packet in _BATCHED
        moving = [*read, *made]
        if batched and any(_key(tensor) in self._weights for tensor in read):
            moving = [tensor for tensor in moving if _key(tensor) not in self._weights]
        elif batched:
            moving = read
        moved = sum(tensor.numel() * tensor.element_size() for tensor in moving)
        kind = str(read[0].dtype).removeprefix("torch.")
        self.products.append(Product(path, module, batched, kind, operations, moved))


class _ExplicitAttention(TorchFunctionMode):
    """Attention as the ONNX exporter writes it, in the type of its operands.

    On tensors without values PyTorch would compute float16 attention in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            return torch.softmax(logits, dim=-1) @ value
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_operations(module: nn.Module, *inputs: torch.Tensor) -> OpCount:
    """Run a module on the meta device and count what it computes and holds.

    Args:
        module: on the meta device; inputs: what its forward takes.

    Raises:
        InputError: the parts of the module do not fit together, because a config names other shapes.
    """
    counted = OpCount(module, inputs)
    try:
        with counted.following(), torch.device("meta"), _ExplicitAttention(), counted:
            module(*inputs)
    except RuntimeError as error:
        raise InputError(
            f"the configs of the checkpoint make no model that runs ({first_line(error)})",
            "download the checkpoint again",
        ) from error
    return counted


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
