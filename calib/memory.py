"""The memory that a process may still take on this machine."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Memory that this process may still take, in its container or machine; None where it is unknown."""
    found = [value for value in (_machine(), _container()) if value is not None]
    return min(found, default=None)


def _machine() -> int | None:
    """Linux's MemAvailable: what is free, and what the page cache would give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2) leaves, with the page cache that it would give back."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
