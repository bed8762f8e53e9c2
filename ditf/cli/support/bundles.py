"""Opening bundles with the trust that the command line gives them, and describing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.cli.support.output import say
from ditf.cli.support.state import state
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.model import Model


def open_bundle(path: Path) -> Bundle:
    """Open a bundle with the signature and host-code options of the command line; see `Bundle.open`."""
    return Bundle.open(path, state.trust)


def open_model(bundle: Bundle, backend: str, fit: str = "stretch") -> Model:
    """Open a bundle's graphs on the --device of the command line, and print the backend; see `ditf.load`."""
    model = Model(bundle, backend, fit, state.device)
    say(f"{bundle.path} on {model.detail} ({model.reason})")
    return model


def pca_text(channels: int, pca: dict[str, Any]) -> str:
    """A line about the projection that a manifest records."""
    return (
        f"projected to {channels} of {pca['of']} channels: {pca['energy_held_out']:.2%} of the energy and"
        f" {pca['matches_within_1px']:.0%} of the matches within 1 px kept, on the golden pair"
    )


def vae_text(vae: dict[str, Any]) -> str:
    """A line about the replacement VAE that a manifest records."""
    revision = "" if vae.get("revision") is None else f" at {vae['revision'][:12]}"
    x_0 = vae["x_0"]
    return (
        f"{vae['id']}{revision} ({vae['class']}); x_0 off by {x_0['relative_error']:.2f} of its spread from"
        f" the checkpoint's own VAE's, channels correlate by {x_0['correlation_min']:.2f} at the least"
    )
