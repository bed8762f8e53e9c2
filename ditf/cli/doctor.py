"""`ditf doctor`: show what is installed here, and which backends open."""

from __future__ import annotations

import platform
from dataclasses import asdict

import ditf
from ditf.cli.support.options import JsonOption, verb
from ditf.cli.support.output import show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.runtime.backends import BACKENDS, Probe, load_backend
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


@verb()
def doctor(
    json_file: JsonOption = None,
) -> None:
    """Show what is installed, which backends open here, and why others do not; exit 3 if none does."""
    check_writable(json_file)
    versions = tool_versions(*_PACKAGES)
    rows: list[tuple[str, ...]] = [("ditf", ditf.__version__, "")]
    rows += [("python", versions["python"], platform.platform())]
    for package, extra in _PACKAGES.items():
        fix = f"pip install 'ditf[{extra}]'" if package not in versions else ""
        rows.append((package, versions.get(package, "not installed"), fix))
    show(table(rows))
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
    ok = any(probe.available for probe in probes.values())
    write_json(
        json_file,
        {
            "versions": {"ditf": ditf.__version__, **versions},
            "backends": {name: asdict(probe) for name, probe in probes.items()},
        },
        ok=ok,
    )
    if not ok:
        raise MissingComponent("no backend opens here", "run: pip install 'ditf[onnxruntime]'")
