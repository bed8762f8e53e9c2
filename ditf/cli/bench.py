"""`ditf bench`: time a bundle on this machine, against peers and against an earlier run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer
from PIL import Image

from ditf.calib.images import procedural_images
from ditf.calib.latency import Change, Timing, compare, measure
from ditf.calib.machine import machine, peak_bytes, resident_bytes
from ditf.cli.support.baseline import Baseline
from ditf.cli.support.bundles import open_bundle, open_model
from ditf.cli.support.exporter import needs_exporter
from ditf.cli.support.options import RUNNING, BackendOption, BundleArgument, JsonOption, verb
from ditf.cli.support.output import bytes_text, say, show, table, write_json
from ditf.cli.support.paths import check_picture, check_writable
from ditf.cli.support.state import state
from ditf.export.planning.export_options import parse_size
from ditf.runtime import Model
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.manifest import MANIFEST
from ditf.runtime.errors import GateFailed, InputError
from ditf.runtime.files.hashed import sha256
from ditf.runtime.files.writing import replacing
from ditf.runtime.images import fit_image

_PACKAGES = ("ditf", "numpy", "pillow", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "diffusers")
_PEERS = ("eager", "compile", "onnxruntime")
_IMAGES = 8  # inputs that rotate
_MOST_PIXELS = 50_000_000


@verb(*RUNNING)
def bench(
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    image_size: Annotated[
        str,
        typer.Option("--image-size", metavar="HxW", help="Size of the test images, before they are fitted."),
    ] = "480x640",
    points: Annotated[int, typer.Option(min=1, max=100_000, help="Number of points to match.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="Total time for each part; at least 3 calls a round.")
    ] = 5.0,
    repetitions: Annotated[
        int, typer.Option(min=3, max=100, help="Number of rounds, in which the parts take turns.")
    ] = 5,
    baseline: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="--json of an earlier run, to compare with.")
    ] = None,
    max_regression: Annotated[
        str,
        typer.Option(
            "--max-regression", metavar="P%", help="Exit 1 if a part is slower than --baseline by more."
        ),
    ] = "10%",
    against: Annotated[
        Optional[str],
        typer.Option(metavar="eager,compile,onnxruntime", help="Peers to measure in the same run."),
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            metavar="ID|DIR",
            help="Checkpoint for eager and compile, if it is no longer where it was exported from.",
        ),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option(metavar="PNG", help="Plot the distributions of times.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Time preprocessing, features, matching and all of them together; exit 1 if slower than --baseline."""
    check_writable(json_file, plot, inputs=(bundle,))
    if plot is not None:
        check_picture(plot, "check")
    size, limit = parse_size(image_size), parse_percent(max_regression)
    if size[0] * size[1] > _MOST_PIXELS:
        raise InputError(
            f"--image-size {image_size} is too large to draw", "for example --image-size 1080x1920"
        )
    peers = _peers(against)
    if model is not None and not set(peers) & {"eager", "compile"}:
        raise InputError("--model is for --against eager or compile", "leave it out, or add --against eager")
    before = None if baseline is None else Baseline(baseline)
    opened = open_bundle(bundle)
    origin = machine(*_PACKAGES)
    if before is not None:
        before.check(origin, {"points": points, "image_size": list(size)})
    at_start = resident_bytes()
    start = time.perf_counter()
    with ExitStack() as stack:
        opened_model = stack.enter_context(open_model(opened, backend))
        load = time.perf_counter() - start
        work = _Work(opened_model, size, points)
        start = time.perf_counter()
        work.end_to_end(0)
        first = time.perf_counter() - start
        if before is not None:
            before.check_backend(opened_model.backend)
        parts: dict[str, Callable[[int], object]] = {
            "preprocess": work.preprocess,
            "features": work.features,
            "match": work.match,
            "end to end": work.end_to_end,
        }
        details = {}
        for peer in peers:
            parts[f"features, {peer}"], details[peer] = _open_peer(stack, peer, opened, work, model)
            say(f"against {peer}: {details[peer]}")
        rows = measure(
            parts, seconds, repetitions, lambda name: None, {"features": opened_model.device_seconds}
        )
        detail, name = opened_model.detail, opened_model.backend
        device = opened_model.device_bytes()
    by_name = {row.name: row for row in rows}
    ratios = [_against(peer, by_name) for peer in peers]
    changes = [] if before is None else before.changes(by_name)
    memory = {"start": at_start, "peak": peak_bytes(), "device": device}
    show(_render(rows, load, first, memory))
    for change in ratios:
        show(
            f"{change.name}: {change.ratio:.2f}x as long as this bundle ({change.low:.2f}-{change.high:.2f})"
        )
    if changes:
        show(_render_changes(changes, limit))
    if plot is not None:
        from ditf.calib.plots.latency import plot_latency

        with replacing(plot) as temporary:
            plot_latency(rows, {} if before is None else before.rows, f"{bundle} on {detail}", temporary)
        say(f"drew {plot}")
    slower = [change for change in changes if change.regressed(limit)]
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "bundle_sha256": sha256(opened.path / MANIFEST),
            "backend": name,
            "detail": detail,
            "image_size": list(size),
            "points": points,
            "repetitions": repetitions,
            "machine": origin,
            "load_seconds": load,
            "first_call_seconds": first,
            "memory_bytes": memory,
            "rows": {row.name: row.to_json() for row in rows},
            "against": {
                peer: {"detail": details[peer], "ratio": one.ratio, "interval": [one.low, one.high]}
                for peer, one in zip(peers, ratios, strict=True)
            },
            "gates": [change.gate(limit) for change in changes],
        },
        ok=not slower,
    )
    if slower:
        what = ", ".join(f"{change.name} {change.ratio:.2f}x" for change in slower)
        raise GateFailed(f"{bundle} is slower than {baseline} by more than {max_regression}: {what}")


class _Work:
    """The timed parts. Inputs rotate, so that no call is answered from a cache."""

    def __init__(self, model: Model, size: tuple[int, int], points: int) -> None:
        self._model = model
        self._images = [Image.fromarray(array) for array in procedural_images(size, _IMAGES)]
        self.fitted = [fit_image(image, model.manifest.size, model.fit)[0] for image in self._images]
        rng = np.random.default_rng(0)
        self._points = rng.uniform((0, 0), (size[1] - 1, size[0] - 1), (points, 2))
        self._maps = [model.features(image) for image in self._images]
        self._feeds = model.feeds()

    def preprocess(self, index: int) -> object:
        return fit_image(self._images[index % _IMAGES], self._model.manifest.size, self._model.fit)

    def features(self, index: int) -> object:
        pixels = self.fitted[index % _IMAGES][None]
        return next(self._model.maps(pixels, self._feeds))

    def match(self, index: int) -> object:
        source, target = (self._maps[(index + one) % _IMAGES] for one in (0, 1))
        return self._model.match(source, target, self._points)

    def end_to_end(self, index: int) -> object:
        """Match a frame against a source whose features are kept."""
        target = self._model.features(self._images[index % _IMAGES])
        return self._model.match(self._maps[(index + 1) % _IMAGES], target, self._points)


def parse_percent(text: str) -> float:
    """Parse a percentage: "10%" is 0.1.

    Raises:
        InputError: the text is not a percentage.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match:
        raise InputError(f"{text!r} is not a percentage", "for example --max-regression 10%")
    return float(match[1]) / 100


def _peers(text: Optional[str]) -> tuple[str, ...]:
    peers = tuple(dict.fromkeys(text.split(","))) if text else ()
    for peer in peers:
        if peer not in _PEERS:
            raise InputError(f"unknown peer {peer!r}", f"choose from {', '.join(_PEERS)}")
    return peers


def _open_peer(
    stack: ExitStack, peer: str, bundle: Bundle, work: _Work, model: Optional[str]
) -> tuple[Callable[[int], object], str]:
    """Open a peer that computes the same features; returns its function and a description."""
    if peer == "onnxruntime":
        other = stack.enter_context(Model(bundle, "onnxruntime", device=state.device))
        feeds = other.feeds()
        return lambda index: next(other.maps(work.fitted[index % _IMAGES][None], feeds)), other.detail
    with needs_exporter():
        from ditf.export.measure.torch_baseline import torch_baseline

    torch = stack.enter_context(torch_baseline(bundle.manifest, peer, model))
    return lambda index: torch.features(work.fitted[index % _IMAGES]), torch.detail


def _against(peer: str, rows: dict[str, Timing]) -> Change:
    change = compare(rows[f"features, {peer}"], rows["features"])
    return Change(change.name, change.ratio, change.low, change.high)


def _render(rows: Sequence[Timing], load: float, first: float, memory: dict[str, Optional[int]]) -> str:
    def milliseconds(value: float) -> str:
        return f"{value * 1e3:.2f}"

    lines: list[tuple[str, ...]] = [
        ("milliseconds", "p50", "p90", "p95", "p99", "mean", "a second", "calls", "clock")
    ]
    for row in rows:
        found = row.statistics()
        times = (milliseconds(found[name]) for name in ("p50", "p90", "p95", "p99", "mean"))
        lines.append((row.name, *times, f"{found['throughput']:.1f}", f"{found['calls']:.0f}", row.clock))
    device = "" if memory["device"] is None else f", {bytes_text(memory['device'])} of the GPU's"
    host = f"{bytes_text(memory['start'] or 0)} before loading, {bytes_text(memory['peak'] or 0)} at most"
    return f"{table(lines)}\nload {load * 1e3:.0f} ms, first call {first * 1e3:.0f} ms; memory {host}{device}"


def _render_changes(changes: Sequence[Change], limit: float) -> str:
    lines: list[tuple[str, ...]] = [("against the baseline", "ratio", "95 % interval", "")]
    for change in changes:
        verdict = "SLOWER" if change.regressed(limit) else "ok" if change.decided else "too noisy to tell"
        lines.append((change.name, f"{change.ratio:.3f}", f"{change.low:.3f}-{change.high:.3f}", verdict))
    return table(lines)
