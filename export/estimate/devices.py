"""The devices that `ditf plan` knows: dense rates, bandwidth and memory, as NVIDIA publishes them.

Rates are without sparsity, at the highest published clock, and count a multiply-add as two operations. FP16
is the rate of tensor cores with float32 sums. FP32 is the rate of CUDA cores, without TF32, which TensorRT
may use. A rate that is not published, and does not follow from published ones, is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        title: the full name.
        float32, float16, int8: dense tera-operations a second; None where nothing is published.
        bandwidth: bandwidth of the memory in GB/s (1e9 bytes).
        memory: GB (1e9 bytes); on a Jetson it is shared with the CPU and the operating system.
        source: where the figures are from.
    """

    title: str
    float32: float
    float16: float
    int8: float | None
    bandwidth: float
    memory: float
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 1e9)

    def seconds(self, kind: str, operations: float, moved: float) -> float:
        """The least seconds that a product takes, at the peak rate or at full bandwidth, whichever is longer.

        Args:
            kind: "float32", "float16", "bfloat16" (as fast as float16 on all of these) or "int8".
            operations: two for a multiply-add.
            moved: bytes read and written.

        Raises:
            InputError: no rate is published for this kind.
        """
        rate = getattr(self, "float16" if kind == "bfloat16" else kind)
        if rate is None:
            raise InputError(f"no {kind} rate is published for the {self.title}", "use --precision fp16")
        return max(operations / (rate * 1e12), moved / (self.bandwidth * 1e9))


DEVICES: dict[str, Device] = {
    "orin-nano": Device(
        "Jetson Orin Nano 8 GB", 1.28, 10.0, 20.0, 68.0, 8.0,
        "Jetson Orin Nano Series data sheet: 40 sparse and 20 dense INT8 TOPS, 68 GB/s; FP16 is half of INT8,"
        " FP32 1024 cores at 625 MHz",
    ),
    "orin-nano-super": Device(
        "Jetson Orin Nano 8 GB, Super mode", 2.09, 16.7, 33.5, 102.0, 8.0,
        "Jetson Orin Nano Super developer kit: 67 sparse INT8 TOPS (33.5 dense), 102 GB/s; FP16 is half of"
        " INT8, FP32 1024 cores at 1020 MHz",
    ),
    "orin-nx": Device(
        "Jetson Orin NX 16 GB", 1.88, 15.0, 30.0, 102.4, 16.0,
        "Jetson Orin NX Series data sheet: 60 of its 100 sparse INT8 TOPS are the GPU's (30 dense), 102.4"
        " GB/s; FP16 is half of INT8, FP32 1024 cores at 918 MHz; its accelerators (DLA) are not used",
    ),
    "orin": Device(
        "Jetson AGX Orin 64 GB", 5.3, 42.5, 85.0, 204.8, 64.0,
        "Jetson AGX Orin technical brief: 5.3 FP32 TFLOPS, 170 of its 275 sparse INT8 TOPS are the GPU's"
        " (85 dense), 204.8 GB/s; FP16 is half of INT8; its accelerators (DLA) are not used",
    ),
    "thor": Device(
        "Jetson AGX Thor, T5000 128 GB", 8.06, 258.0, None, 273.0, 128.0,
        "Jetson Thor data sheet: 2070 sparse FP4 TFLOPS, 273 GB/s; dense FP16 is an eighth (half for sparsity"
        " and half for each step from FP4 to FP16), FP32 2560 cores at 1.57 GHz",
    ),
    "rtx-4090": Device(
        "GeForce RTX 4090", 82.6, 165.2, 660.6, 1008.0, 24.0,
        "Ada GPU architecture white paper, appendix A: FP16 with FP32 accumulate (330.3 with FP16)",
    ),
    "l4": Device(
        "L4", 30.3, 121.0, 242.5, 300.0, 24.0,
        "L4 data sheet: 242 FP16 TFLOPS and 485 INT8 TOPS with sparsity",
    ),
    "a100": Device(
        "A100 SXM 80 GB", 19.5, 312.0, 624.0, 2039.0, 80.0,
        "A100 data sheet",
    ),
    "h200": Device(
        "H200 SXM", 67.0, 989.5, 1979.0, 4800.0, 141.0,
        "H200 data sheet: 1,979 FP16 TFLOPS and 3,958 INT8 TOPS with sparsity",
    ),
}  # fmt: skip
"""Devices by their names for `ditf plan --device`."""


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        InputError: the device is unknown; the message lists those that are known.
    """
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r:.60}", f"choose {', '.join(DEVICES)}")
    return DEVICES[name]
