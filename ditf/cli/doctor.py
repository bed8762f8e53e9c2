"""`ditf doctor`: show what is installed here, the GPUs, which backends open, and trtexec's command lines."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import ditf
from ditf.cli.support.bundles import open_bundle
from ditf.cli.support.options import SIGNATURE, JsonOption, verb
from ditf.cli.support.output import show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.engines.trtexec import trtexec_lines, unread_opset
from ditf.runtime.backends import BACKENDS, Probe, load_backend
from ditf.runtime.backends.flavour import RTX, has_rtx
from ditf.runtime.backends.gpu import Gpu, find_gpus, version_text
from ditf.runtime.bundles.manifest import tool_versions
from ditf.runtime.errors import MissingComponent

_PACKAGES = {
    "numpy": "",
    "pillow": "",
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "matplotlib": "check",
    "polygraphy": "check",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime-gpu",
    "tensorrt-rtx": "tensorrt-rtx",
}
_JETSON = (
    "TensorRT comes with JetPack: 11.4 with JetPack 7.2.2 on AGX Orin and Thor, 10.3 with JetPack 6 on other"
    " Orins; build with ditf build --backend tensorrt (docs/jetson.md)"
)


@verb(SIGNATURE)
def doctor(
    bundle: Annotated[
        Optional[Path],
        typer.Argument(metavar="[BUNDLE]", help="Also show how trtexec builds this bundle's graphs."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show what is installed, the GPUs, and which backends open here; exit 3 if none does."""
    check_writable(json_file, inputs=(bundle,) if bundle else ())
    opened = None if bundle is None else open_bundle(bundle)
    gpus = find_gpus()
    versions = tool_versions(*_PACKAGES)
    rows: list[tuple[str, ...]] = [("ditf", ditf.__version__, "")]
    rows += [("python", versions["python"], platform.platform())]
    for package, extra in _PACKAGES.items():
        helps = package not in versions and (package != RTX or not gpus or any(map(has_rtx, gpus)))
        fix = f"pip install 'ditf[{extra}]'" if helps else ""
        rows.append((package, versions.get(package, "not installed"), fix))
    show(table(rows))
    _show_gpus(gpus)
    probes = {name: load_backend(name).probe() for name in BACKENDS}
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        probes["onnxruntime"] = Probe(
            False,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            "run: pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    show("\nbackends")
    for name, probe in probes.items():
        fix = f"; {probe.fix}" if probe.fix else ""
        show(f"  {name}: {'opens' if probe.available else 'does not open'}, {probe.detail}{fix}")
    document: dict[str, Any] = {
        "versions": {"ditf": ditf.__version__, **versions},
        "gpus": [asdict(gpu) for gpu in gpus],
        "backends": {name: asdict(probe) for name, probe in probes.items()},
    }
    if opened is not None:
        document["trtexec"] = trtexec_lines(opened)
        show("\n".join(["\ntrtexec", *(f"  {line}" for line in document["trtexec"])]))
        older = unread_opset(opened.manifest.opset, "10.3 to 10.14")
        if older:
            show(f"  {older}")
    ok = any(probe.available for probe in probes.values())
    write_json(json_file, document, ok=ok)
    if not ok:
        raise MissingComponent("no backend opens here", "run: pip install 'ditf[onnxruntime]'")


def _show_gpus(gpus: Sequence[Gpu]) -> None:
    show("\nGPUs")
    for index, gpu in enumerate(gpus):
        memory = ", memory shared with the CPU" if gpu.integrated else ""
        show(f"  cuda:{index}: {gpu}, driver for CUDA {version_text(gpu.driver)}{memory}")
    if not gpus:
        show("  none: no NVIDIA driver answers")
    if any(gpu.integrated and not has_rtx(gpu) for gpu in gpus):
        show(f"  {_JETSON}")
