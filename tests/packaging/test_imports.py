"""What an import pulls in, and what works with nothing but numpy and pillow installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "typer",
    "rich",
    "pydantic",
    "fastapi",
    "uvicorn",
    "prometheus_client",
)


def python(code, interpreter=sys.executable, **options):
    return subprocess.run([interpreter, "-c", code], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "module",
    [
        "ditf",
        "ditf.runtime",
        "ditf.runtime.serving.protocol.contract",
        "ditf.runtime.serving.protocol.v2",
        "ditf.runtime.serving.service",
        "ditf.calib.parity",
        "ditf.engines.build",
    ],
)
def test_light_imports(module):
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = python(code)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory, root):
    """An interpreter with numpy, pillow and ditf itself, and nothing else."""
    import numpy

    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    installed = Path(numpy.__path__[0]).parent
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs"):
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    (site / "ditf").symlink_to(root / "ditf")
    return folder / "bin" / "python"


def test_the_runtime_in_a_bare_environment(bare, demo_bundle):
    code = f"""
import ditf
from ditf.runtime import FeatureMap
from ditf.runtime.matching import points
import numpy as np
maps = [FeatureMap(np.random.rand(4, 3, 3).astype("float32"), (9, 9)) for _ in "ab"]
print(len(points.match_points(*maps, [[1, 2]]).scores))
try:
    ditf.load({str(demo_bundle)!r})
except ditf.DitfError as error:
    print(error.exit_code, error)
"""
    done = python(code, bare, cwd=bare.parent)
    assert done.stdout.startswith("1\n3 no backend opens here"), done.stderr
    assert "pip install 'ditf[onnxruntime]'" in done.stdout


def test_importtime_in_a_bare_environment(bare):
    done = subprocess.run(
        [bare, "-X", "importtime", "-c", "import ditf.runtime"],
        capture_output=True,
        text=True,
        cwd=bare.parent,
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ditf.runtime.model" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("package", ["torch", "diffusers", "onnx"])
def test_the_exporter_without_its_extra(package, tmp_path):
    """None in sys.modules is Python's own way of a package that cannot be imported."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; from ditf.cli.main import run;"
        " sys.exit(run(['export', '--quiet']))"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr == f"error: {package} is not installed; run: pip install 'ditf[export]'\n"
