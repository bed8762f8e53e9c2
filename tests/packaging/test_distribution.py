"""Wheel and sdist: the four folders under the package's names, everything in the list, nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile

import pytest
import tomllib


@pytest.fixture(scope="module")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """Built from a clean copy of what git would hold."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    subprocess.run(["tar", "cf", folder / "tree.tar", *listed], cwd=root, check=True)
    (folder / "tree").mkdir()
    subprocess.run(["tar", "xf", folder / "tree.tar", "-C", folder / "tree"], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def source_modules(root):
    folders = {"ditf": root / "ditf"} | {
        f"ditf/{name}": root / name for name in ("calib", "engines", "export", "runtime")
    }
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
        if not any((folder / part).is_symlink() for part in path.relative_to(folder).parts[:1])
    }


def test_the_package_list_is_the_tree(root, pyproject):
    packages = {str(name.rpartition("/")[0]).replace("/", ".") for name in source_modules(root)}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages


def test_wheel(root, built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    modules = {name for name in names if name.endswith(".py")}
    assert modules == source_modules(root)
    rest = {name for name in names - modules if ".dist-info/" not in name}
    data = {
        f"ditf/{path.relative_to(root)}"
        for folder in ("export/demo_model", "runtime/serving/http/static")
        for path in (root / folder).rglob("*")
        if path.is_file()
    }
    assert rest == {"ditf/py.typed", *data}
    weights = root / "export" / "demo_model" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 12e6
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_what_the_wheel_holds(root, built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("pyproject.toml", "README.md", "LICENSE", "export/exporter.py", "runtime/model.py"):
        assert path in names


def test_extras_are_the_ones_errors_name(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    assert {"export", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "serve", "dev"} <= set(extras)


def test_no_machine_paths_or_hosts(root):
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    for name in files.stdout.split():
        path = root / name
        if path.suffix in {".py", ".md", ".toml", ".txt"} and not path.is_symlink():
            text = path.read_text("utf-8")
            assert "/work/" + "main" not in text, name
            assert "file:///" + "opt" not in text, name
