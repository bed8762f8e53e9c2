"""Switching off the usage reports of libraries that ditf uses, unless the user asked for them."""

from __future__ import annotations

import os

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime reports a device identifier and events every few seconds
    "HF_HUB_DISABLE_TELEMETRY": "1",  # read by the hub's client, and through it by transformers and diffusers
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables and the values that switch reports off. They must be set early: ONNX Runtime reads
its variable when it is imported, and its function `disable_telemetry_events` acts after the first report."""


def switch_off() -> None:
    """Set those variables that are not set yet, for this process and those it starts."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
