"""CUDA's runtime API through cuda-python: calls and their errors, devices, device and pinned memory."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from ditf.runtime.backends.gpu import find_gpu, version_text
from ditf.runtime.errors import DitfError, InputError, MissingComponent

_NO_DEVICE = (
    "cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorInitializationError",
    "cudaErrorSystemDriverMismatch", "cudaErrorStubLibrary",
)  # fmt: skip

STICKY = (
    "cudaErrorAssert", "cudaErrorContained", "cudaErrorECCUncorrectable", "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError", "cudaErrorIllegalAddress", "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc", "cudaErrorLaunchFailure", "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress", "cudaErrorMpsClientTerminated", "cudaErrorTensorMemoryLeak",
)  # fmt: skip
"""Errors after which every call fails until the process ends, by CUDA's documentation."""


class OutOfDeviceMemory(DitfError):
    """The GPU has less free memory than was asked for."""


class GpuFailed(DitfError):
    """The GPU failed in a way that only a new process recovers from."""


class Cuda:
    """CUDA's runtime API on one device, with error codes turned into exceptions.

    CUDA has a current device for each thread. A thread calls `use` before anything else of a `Cuda`.

    Args:
        device: the number of the GPU, as CUDA_VISIBLE_DEVICES leaves it.

    Attributes:
        device: as given.
        failed: what ended the use of the GPU in this process; "" while it works.
        sessions: identifies those that are open. Without one, memory that arrays give back is freed.

    Raises:
        MissingComponent: cuda-python is not installed, or no driver answers.
        InputError: there is no such device.
    """

    def __init__(self, device: int = 0) -> None:
        self._api = _binding()
        self.failed = ""
        count = int(self("cudaGetDeviceCount"))
        if not count:
            raise MissingComponent("no NVIDIA GPU is visible", "look at CUDA_VISIBLE_DEVICES")
        if not 0 <= device < count:
            raise InputError(
                f"there is no cuda:{device}, the last device is cuda:{count - 1}",
                "ditf doctor lists the devices",
            )
        self.device = device
        self.sessions: set[int] = set()
        self._pool: dict[int, list[int]] = {}  # free device memory by size
        self._lock = threading.RLock()  # reentrant: the garbage collector may give memory back at any time

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function such as "cudaStreamCreate" and return its results without the error code."""
        error, *values = getattr(self._api, name)(*arguments)
        if error.name != "cudaSuccess":
            raise self._explained(name, error.name)
        return values[0] if len(values) == 1 else tuple(values)

    def constant(self, name: str) -> Any:
        """Look up a value such as "cudaMemcpyKind.cudaMemcpyHostToDevice"."""
        value = self._api
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def use(self) -> None:
        """Make the device current in the calling thread, in which it stays current."""
        self("cudaSetDevice", self.device)

    @property
    def memory(self) -> tuple[int, int]:
        """The free and the total bytes of the GPU's memory."""
        free, total = self("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory and return its address.

        Raises:
            OutOfDeviceMemory: too little is free; the message says how much is needed and free.
        """
        try:
            return int(self("cudaMalloc", nbytes))
        except OutOfDeviceMemory:
            self.trim()
        try:
            return int(self("cudaMalloc", nbytes))
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{nbytes / 1e6:.1f} MB of GPU memory are needed, {self.memory[0] / 1e6:.1f} MB are free",
                error.fix,
            ) from error

    def free(self, address: int) -> None:
        self("cudaFree", address)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Queue a copy. CUDA tells host memory from device memory by the addresses."""
        self(
            "cudaMemcpyAsync",
            target,
            source,
            nbytes,
            self.constant("cudaMemcpyKind.cudaMemcpyDefault"),
            stream,
        )

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Make an array in device memory, reusing memory of its size that an earlier array gave back."""
        nbytes = array_bytes(shape, dtype)
        with self._lock:
            free = self._pool.get(nbytes)
            address = free.pop() if free else None
        memory = _Leased(self.allocate(nbytes) if address is None else address)
        weakref.finalize(memory, self._give_back, memory.address, nbytes).atexit = False
        return DeviceArray(self, memory, memory.address, shape, dtype)

    def _give_back(self, address: int, nbytes: int) -> None:
        with self._lock:
            self._pool.setdefault(nbytes, []).append(address)
        if not self.sessions:
            with suppress(DitfError):
                self.use()
                self.trim()

    def trim(self) -> None:
        """Free the memory that arrays gave back. After an error the rest is still freed."""
        with self._lock:
            addresses = [address for free in self._pool.values() for address in free]
            self._pool.clear()
        with ExitStack() as stack:
            for address in addresses:
                stack.callback(self.free, address)

    def gpu_failed(self) -> GpuFailed:
        """The error for every use of the GPU after it `failed`."""
        return GpuFailed(
            f"the GPU failed ({self.failed}), and this process cannot use it any more",
            "start the process again; ditf check -v says more",
        )

    def _explained(self, function: str, error: str) -> DitfError:
        self._api.cudaGetLastError()  # clears it: TensorRT asks for it, and would take it for its own
        if error in _NO_DEVICE:
            return no_driver(f"{error} of {function}")
        if error == "cudaErrorDevicesUnavailable":
            return MissingComponent(
                f"another process has the GPU to itself ({error} of {function})",
                "end that process, or choose another --device",
            )
        if error in STICKY or self.failed:
            self.failed = self.failed or f"{error} of {function}"
            return self.gpu_failed()
        if error == "cudaErrorMemoryAllocation" and function == "cudaHostAlloc":
            return OutOfDeviceMemory(
                "the GPU's driver can lock no more host memory (cudaHostAlloc)",
                "free some, or use a smaller --size or --batch",
            )
        if error == "cudaErrorMemoryAllocation":
            return OutOfDeviceMemory(
                f"the GPU is out of memory ({function})",
                "free some, or use a smaller --size or --batch, an earlier --layer, or --ensemble 1",
            )
        return DitfError(
            f"the GPU failed: {error} of {function}", "open the bundle again; ditf check -v says more"
        )


def array_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The size of an array in bytes."""
    return math.prod(shape) * dtype.itemsize


class _Leased:
    """Device memory that returns to the pool when no array uses it any more."""

    def __init__(self, address: int) -> None:
        self.address = address


class DeviceArray:
    """An array in GPU memory.

    Attributes:
        address: the address of its first element.
        shape, dtype: as in numpy.
    """

    def __init__(
        self, cuda: Cuda, memory: _Leased, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._cuda = cuda
        self._memory = memory  # kept alive
        self.address = address
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return array_bytes(self.shape, self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceArray:
        """The part at an index of the first axis, which shares the memory."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(index)
        stride = self.nbytes // self.shape[0]
        return DeviceArray(
            self._cuda, self._memory, self.address + index * stride, self.shape[1:], self.dtype
        )

    def reshape(self, *shape: int) -> DeviceArray:
        """A view of the same memory in another shape."""
        return DeviceArray(self._cuda, self._memory, self.address, shape, self.dtype)

    def numpy(self) -> np.ndarray:
        """A copy in host memory."""
        array = np.empty(self.shape, self.dtype)
        self._cuda.use()
        self._cuda(
            "cudaMemcpy",
            array.ctypes.data,
            self.address,
            self.nbytes,
            self._cuda.constant("cudaMemcpyKind.cudaMemcpyDeviceToHost"),
        )
        return array


class Pinned:
    """Page-locked host memory, from and to which copies run at full speed. It grows on demand."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.address = 0
        self._nbytes = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The memory as an array. It overlaps the array that an earlier call returned."""
        nbytes = array_bytes(shape, dtype)
        if nbytes > self._nbytes:
            self.close()
            self.address = int(self._cuda("cudaHostAlloc", nbytes, 0))
            self._nbytes = nbytes
        block = (ctypes.c_byte * nbytes).from_address(self.address)
        return np.ndarray(shape, dtype, buffer=memoryview(block))

    def close(self) -> None:
        if self.address:
            address, self.address, self._nbytes = self.address, 0, 0
            self._cuda("cudaFreeHost", address)


@functools.cache
def open_cuda(device: int) -> Cuda:
    """The one `Cuda` of a device in this process, so that all its sessions share the pool of device memory.

    Raises:
        MissingComponent, InputError: see `Cuda`.
    """
    return Cuda(device)


def no_driver(detail: str) -> MissingComponent:
    """The error for a machine without a driver, or with one that is older than cuda-python."""
    gpu = find_gpu()
    if gpu is None:
        return MissingComponent(
            f"no NVIDIA driver answers ({detail})",
            "run it where there is an NVIDIA GPU, or use --backend onnxruntime",
        )
    driver = version_text(gpu.driver)
    # cuda-python, because there is no cuda-bindings before 12.8. A bound, because not every version exists.
    # The minor version counts: a Jetson's driver takes no newer one. Both packages write the same files.
    return MissingComponent(
        f"the driver runs CUDA up to {driver}, cuda-python is for a newer one ({detail})",
        f"run: pip uninstall -y cuda-bindings cuda-python && pip install 'cuda-python<={driver}.99'",
    )


def _binding() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        try:
            from cuda import cudart as runtime  # before cuda-python 12.6
        except ImportError as error:
            raise MissingComponent(
                f"cuda-python is not installed ({error})", "run: pip install 'ditf[tensorrt]'"
            ) from error
    return runtime
