"""Usage reports of the libraries that ditf uses, which are off unless the user asked for them."""

from __future__ import annotations

import os

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: an identifier of the device, and events every few seconds
    "HF_HUB_DISABLE_TELEMETRY": "1",  # the hub's client; transformers and diffusers ask it
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables and their values for "off". ONNX Runtime reads its own when it is imported, and its
later switch (`disable_telemetry_events`) comes after the first report."""


def switch_off() -> None:
    """Set the variables that are not set, for this process and those it starts."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
