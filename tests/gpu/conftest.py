"""Where the tests of engines run: on the GPU that is here, and on the stand-in of tests/standin.

The stand-in proves control flow, and nothing about speed, capture on real drivers or accuracy: only what is
called `gpu` ran on one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ditf.runtime.backends.gpu import find_gpu
from tests.standin.fixtures import engine_for, installed
from tests.standin.world import World

_NO_GPU = "no NVIDIA driver answers: engines are built, and run on the stand-in only"
GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(find_gpu() is None, reason=_NO_GPU)])
MACHINES = ["standin-rtx", "standin-full", GPU]
FULL = "11.4.0.106"


@dataclass
class Machine:
    """What runs the engines of a test.

    Attributes:
        name: "standin-rtx", "standin-full" or "gpu".
        backend: "tensorrt-rtx" or "tensorrt".
        world: the stand-in; None on a GPU.
    """

    name: str
    backend: str
    world: World | None

    @property
    def slack(self) -> int:
        """Bytes of memory that may be gone without a leak: a driver keeps what it gave to its own modules."""
        return 0 if self.world is not None else 32 << 20

    @property
    def free_bytes(self) -> int:
        """The free memory of the current device."""
        from cuda.bindings import runtime

        error, free, _ = runtime.cudaMemGetInfo()
        assert error.name == "cudaSuccess"
        return int(free)


@pytest.fixture(params=MACHINES)
def machine(
    request: pytest.FixtureRequest, standin_plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    if request.param == "gpu":
        from ditf.runtime.backends.flavour import choose_flavour
        from ditf.runtime.errors import MissingComponent

        try:
            backend = choose_flavour("auto")[0].name
        except MissingComponent as error:
            pytest.skip(str(error))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield Machine("gpu", backend, None)
        return
    full = FULL if request.param == "standin-full" else None
    with installed(World(), full) as world:
        yield Machine(request.param, "tensorrt-rtx" if full is None else "tensorrt", world)
    assert world.faults == []
    assert world.alive() == []


Built = Callable[..., Path]


@pytest.fixture(scope="session")
def engines() -> dict[Any, Path]:
    """The bundles that were built, by machine, source and batch."""
    return {}


@pytest.fixture
def built(machine: Machine, engines: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Call it for a copy of a bundle with an engine for the machine. Read-only: built once a process."""

    def make(source: Path, batch: tuple[tuple[int, ...], ...] = ()) -> Path:
        key = (machine.name, source, batch)
        if key not in engines:
            path = tmp_path_factory.mktemp("engines") / "bundle"
            if machine.world is not None:
                engine_for(source, path, batch, FULL if machine.backend == "tensorrt" else None)
            else:
                _build(machine, source, path, batch)
            engines[key] = path
        return engines[key]

    return make


def _build(machine: Machine, source: Path, path: Path, batch: tuple[tuple[int, ...], ...]) -> None:
    from ditf.engines.build import build
    from ditf.engines.compile import BuildOptions
    from ditf.runtime.backends.flavour import FLAVOURS, load_flavour
    from ditf.runtime.bundles.bundle import Bundle

    target = None if machine.backend == "tensorrt" else "portable"
    bundle = Bundle.open(shutil.copytree(source, path))
    build(bundle, FLAVOURS[machine.backend], load_flavour(machine.backend), BuildOptions(target), batch)


@pytest.fixture
def opened(machine: Machine, built: Built) -> Callable[..., AbstractContextManager[Any]]:
    """Call it for an open model of a bundle's engine."""
    import ditf

    @contextmanager
    def open_model(source: Path, batch: tuple[tuple[int, ...], ...] = ()) -> Iterator[Any]:
        with ditf.load(built(source, batch), machine.backend) as model:
            yield model

    return open_model


@pytest.fixture
def model(opened: Callable[..., AbstractContextManager[Any]], demo_bundle: Path) -> Iterator[Any]:
    """The demo bundle's engine."""
    with opened(demo_bundle) as model:
        yield model


@pytest.fixture
def reference(demo_bundle: Path) -> Iterator[Any]:
    """The demo bundle on ONNX Runtime's CPU."""
    import ditf

    with ditf.load(demo_bundle, "onnxruntime", device="cpu") as model:
        yield model
