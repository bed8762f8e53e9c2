"""Describing the machine, so that no figure is shown without it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ditf.runtime.backends.gpu import find_gpu, version_text
from ditf.runtime.bundles.manifest import tool_versions


def machine(*packages: str) -> dict[str, Any]:
    """CPU, GPU, memory, load, operating system, power mode and package versions.

    Args:
        packages: distributions whose versions are included if they are installed.
    """
    gpu = find_gpu()
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": proc_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "memory_bytes": kilobytes(Path("/proc/meminfo"), "MemTotal"),
        "load_average_1min": os.getloadavg()[0],
        "os": platform.platform(),
        "gpu": None if gpu is None else str(gpu),
        "driver_cuda": None if gpu is None else version_text(gpu.driver),
        "power_mode": _power_mode(),
        "versions": tool_versions(*packages),
    }
    return {name: value for name, value in found.items() if value is not None}


def resident_bytes() -> int:
    """Resident memory of this process now, including pages of mapped files."""
    return kilobytes(Path("/proc/self/status"), "VmRSS")


def peak_bytes() -> int:
    """Peak of `resident_bytes`.

    getrusage's ru_maxrss would not do: on Linux a child inherits the value of the process that forked it.
    """
    return kilobytes(Path("/proc/self/status"), "VmHWM")


def proc_field(path: Path, name: str) -> str:
    """The first value of a field in a file of /proc; "" if there is no such file or field."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def kilobytes(path: Path, name: str) -> int:
    """Convert a field such as "VmHWM: 1234 kB" to bytes."""
    return int((proc_field(path, name) or "0 kB").split()[0]) * 1024


def _instructions() -> str:
    """The CPU's vector instructions, which decide the kernels that a library can use."""
    flags = proc_field(Path("/proc/cpuinfo"), "flags").split()
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16")
    return " ".join(flag for flag in known if flag in flags) or platform.machine()


def _power_mode() -> str | None:
    """A Jetson's power mode as nvpmodel names it; None on other machines."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if "NV Power Mode" in line]
    return lines[0].rpartition(":")[2].strip() if lines else None
