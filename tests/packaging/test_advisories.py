"""No version with a known vulnerability is allowed or tested; what a device installs is locked by hash."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = "requirements-device.txt"
EXTRAS = ("onnxruntime", "serve")  # what the lock is made for
NEWER = {"python_full_version": "3.12.0", "python_version": "3.12"}  # a Python that the constraints are of


@pytest.fixture(scope="module")
def safe(root):
    packages = json.loads((root / "tests" / "packaging" / "advisories.json").read_text())["packages"]
    return {name: Version(entry["safe"]) for name, entry in packages.items()}


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def pinned(root, name):
    lines = (root / name).read_text().splitlines()
    return [Requirement(line.rstrip("\\").strip()) for line in lines if re.match(r"[A-Za-z]", line)]


def version_of(pin):
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return Version(specifier.version)


def least(requirement):
    """Its lower bound, or 0."""
    return max((Version(one.version) for one in requirement.specifier), default=Version("0"))


def test_no_lower_bound_is_beneath_a_fix(project, safe):
    extras = {extra: lines for extra, lines in project["optional-dependencies"].items() if extra != "dev"}
    bounds = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    named = {canonicalize_name(bound.name) for bound in bounds}
    # protobuf, requests and urllib3 are asked for by other packages alone
    assert safe.keys() - named == {"protobuf", "requests", "urllib3"}
    for bound in bounds:
        first = safe.get(canonicalize_name(bound.name), Version("0"))
        assert least(bound) >= first, f"{bound} allows versions before {first}"


@pytest.mark.parametrize("name", ["constraints.txt", LOCK])
def test_no_version_that_is_pinned_has_a_known_vulnerability(root, safe, name):
    for pin in pinned(root, name):
        first = safe.get(canonicalize_name(pin.name), Version("0"))
        assert version_of(pin) >= first, f"{pin} is before {first}"


def test_the_lock_agrees_with_the_constraints(root):
    """Where both name a package for a Python, they name one version."""
    tested = {canonicalize_name(pin.name): pin for pin in pinned(root, "constraints.txt")}
    for pin in pinned(root, LOCK):
        other = tested.get(canonicalize_name(pin.name))
        if other is not None and (pin.marker is None or pin.marker.evaluate(NEWER)):
            assert version_of(pin) == version_of(other), f"{pin}, {other}"


def test_the_lock_has_what_a_device_asks_for(root, project):
    pins = pinned(root, LOCK)
    wanted = [*project["dependencies"], *(one for e in EXTRAS for one in project["optional-dependencies"][e])]
    for bound in map(Requirement, wanted):
        found = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(bound.name)]
        assert found, f"{bound} is not locked"
        assert all(version_of(pin) in bound.specifier for pin in found), f"{bound}: {found}"
    assert not {"torch", "diffusers", "transformers"} & {pin.name for pin in pins}


def test_every_version_is_locked_by_hash_and_no_host_is_named(root):
    text = (root / LOCK).read_text()
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=[A-Za-z])", text.strip()))
    assert "://" not in text
    assert "--index" not in text


def test_pip_accepts_the_lock(root, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--require-hashes", "--only-binary", ":all:", "--target", tmp_path, "-r", root / LOCK]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        pytest.skip("no registry with these versions is reached")
    assert done.returncode == 0, done.stderr
