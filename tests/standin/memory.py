"""Device memory that the host cannot dereference, and page-locked host memory."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np

_SPACE = 1 << 40  # bytes of addresses that are reserved and can neither be read nor written
_ALIGNMENT = 512  # of what cudaMalloc returns
_GUARD = 1 << 16  # bytes of nothing behind each allocation
_POISON = 0xFF  # NaN in every floating-point type
_PROT_NONE, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0, 0x02, 0x20, 0x4000


class Illegal(Exception):
    """An address that is not allocated, or a range that leaves its allocation."""


@dataclass
class Block:
    """One allocation; its bytes lie elsewhere."""

    address: int
    nbytes: int
    device: int
    content: np.ndarray
    freed: bool = False


def _reserve() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    address = libc.mmap(None, _SPACE, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "no address space for the stand-in's device memory")
    return int(address)


class DeviceMemory:
    """The memory of all devices. Addresses are never used twice, so a use after free is always found.

    Args:
        totals: bytes of each device.
    """

    _base = 0
    _top = 0  # shared by all instances of the process, so that no address is used twice

    def __init__(self, totals: list[int]) -> None:
        cls = DeviceMemory
        if not cls._base:
            cls._base = cls._top = -(-_reserve() // _GUARD) * _GUARD
        self.totals = list(totals)
        self.used = [0 for _ in totals]
        self._starts: list[int] = []
        self._blocks: list[Block] = []

    def allocate(self, nbytes: int, device: int) -> int:
        """The address of new, poisoned memory; 0 if too little is free."""
        if nbytes > self.totals[device] - self.used[device]:
            return 0
        cls = DeviceMemory
        address = cls._top
        cls._top += -(-(nbytes + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        block = Block(address, nbytes, device, np.full(nbytes, _POISON, np.uint8))
        self.used[device] += nbytes
        self._starts.append(address)
        self._blocks.append(block)
        return address

    def free(self, address: int) -> None:
        block = self._block(address)
        if block.address != address:
            raise Illegal(f"free of {address:#x}, which is inside an allocation")
        if block.freed:
            raise Illegal(f"double free of {address:#x}")
        block.freed = True
        block.content = np.empty(0, np.uint8)
        self.used[block.device] -= block.nbytes

    def owns(self, address: int) -> bool:
        """Whether an address is in the range of device memory, allocated or not."""
        return DeviceMemory._base <= address < DeviceMemory._base + _SPACE

    def device_of(self, address: int) -> int:
        return self._block(address).device

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes of a range, to be read or written.

        Raises:
            Illegal: the range was freed, never allocated, or leaves its allocation.
        """
        block = self._block(address)
        if block.freed:
            raise Illegal(f"use of {address:#x} after it was freed")
        start = address - block.address
        if start + nbytes > block.nbytes:
            raise Illegal(f"{nbytes} bytes at {address:#x} leave an allocation of {block.nbytes} bytes")
        return block.content[start : start + nbytes]

    def alive(self) -> list[str]:
        return [
            f"{block.nbytes} bytes of device memory at {block.address:#x}"
            for block in self._blocks
            if not block.freed
        ]

    def _block(self, address: int) -> Block:
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address > self._blocks[index].address + self._blocks[index].nbytes:
            raise Illegal(f"{address:#x} was never allocated")
        return self._blocks[index]


class HostMemory:
    """Page-locked host memory, by address."""

    def __init__(self) -> None:
        self._blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._registered: dict[int, int] = {}  # memory of others: {address: bytes}
        self._freed: set[int] = set()

    def allocate(self, nbytes: int) -> int:
        block = ctypes.create_string_buffer(max(1, nbytes))
        address = ctypes.addressof(block)
        ctypes.memset(address, _POISON, nbytes)
        self._blocks[address] = block
        self._freed.discard(address)
        return address

    def free(self, address: int) -> None:
        if address not in self._blocks:
            what = "double free" if address in self._freed else "free of memory that is not page-locked:"
            raise Illegal(f"{what} {address:#x} on the host")
        del self._blocks[address]
        self._freed.add(address)

    def register(self, address: int, nbytes: int) -> None:
        self._registered[address] = nbytes

    def unregister(self, address: int) -> None:
        if address not in self._registered:
            raise Illegal(f"{address:#x} on the host was not registered")
        del self._registered[address]

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether a range lies in one page-locked block."""
        sizes = {start: len(block) for start, block in self._blocks.items()} | self._registered
        return any(start <= address and address + nbytes <= start + size for start, size in sizes.items())

    def alive(self) -> list[str]:
        found = [f"{len(block)} bytes of page-locked memory" for block in self._blocks.values()]
        return found + [f"{size} bytes of registered memory" for size in self._registered.values()]


def host_view(address: int, nbytes: int) -> np.ndarray:
    """Host memory as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
