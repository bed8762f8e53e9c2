"""Fixtures that run a test on the stand-in, and leave nothing of it behind."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.standin import registry
from tests.standin.world import DeviceModel, World

PATH = Path(__file__).parent / "path"


@contextmanager
def installed(world: World, full: str | None = None) -> Iterator[World]:
    """The stand-in in this process, for a while.

    The user's cache is empty at first.

    Args:
        full: the version of full TensorRT that is installed as well; None for TensorRT-RTX alone.
    """
    from ditf.runtime.backends import cuda
    from tests.standin.install import library_loader, modules

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if full is not None:  # its builder's config is TensorRT-RTX's, which warns of what only full has
            warnings.filterwarnings("ignore", ".*TensorRT-RTX", DeprecationWarning)
        patch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="cache-", dir=registry.folder()))
        patch.setattr(ctypes, "CDLL", library_loader(world, ctypes.CDLL))
        for name, module in modules(world, full).items():
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                patch.setattr(importlib.import_module(parent), child, module)
        cuda.open_cuda.cache_clear()
        try:
            yield world
        finally:
            cuda.open_cuda.cache_clear()
            if world.alive():  # in a circle of references; collecting takes a second where torch is imported
                gc.collect()


@pytest.fixture(scope="session")
def standin_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the session's plans are registered."""
    folder = tmp_path_factory.mktemp("standin-plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.FOLDER, str(folder))
        yield folder


@pytest.fixture
def standin(standin_plans: Path) -> Iterator[World]:
    """The stand-in with one device and TensorRT-RTX. A test that leaves a fault fails."""
    with installed(World()) as world:
        yield world
    assert world.faults == []


@pytest.fixture
def breakable_standin(standin_plans: Path) -> Iterator[World]:
    """The stand-in for tests that break its rules."""
    with installed(World()) as world:
        yield world


@pytest.fixture(scope="session")
def standin_bundle(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path, standin_plans: Path) -> Path:
    """`demo_bundle` with a TensorRT-RTX engine for the stand-in's sm_89. Read-only."""
    return engine_for(demo_bundle, tmp_path_factory.mktemp("standin") / "demo")


def engine_for(
    source: Path, path: Path, batch: tuple[tuple[int, ...], ...] = (), full: str | None = None
) -> Path:
    """A copy of a bundle with an engine that the stand-in runs.

    Args:
        full: build with the stand-in for this version of full TensorRT; None for TensorRT-RTX.
    """
    from ditf.engines.build import build
    from ditf.engines.compile import BuildOptions
    from ditf.runtime.backends.flavour import FLAVOURS, load_flavour
    from ditf.runtime.bundles.bundle import Bundle

    name = "tensorrt-rtx" if full is None else "tensorrt"
    with installed(World(), full):
        bundle = Bundle.open(shutil.copytree(source, path))
        target = "sm_89" if full is None else None
        build(bundle, FLAVOURS[name], load_flavour(name), BuildOptions(target), batch)
    return path


@pytest.fixture
def standin_environment(standin_plans: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it to let child processes run on the stand-in."""
    from tests.standin.install import DEVICES
    from tests.standin.modules import VERSION

    def set_up(models: tuple[DeviceModel, ...] = (DeviceModel(),), full: str | None = None) -> None:
        monkeypatch.setenv("PYTHONPATH", f"{PATH}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv(DEVICES, json.dumps([asdict(model) for model in models]))
        if full is not None:
            monkeypatch.setenv(VERSION, full)

    return set_up
