"""Tiny real checkpoints, bundles and an engine, each made once for all of pytest-xdist's processes.

What imports torch is imported where it is used: pytest-xdist's controller reads this file and runs no test.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.standin.fixtures import (  # noqa: F401
    breakable_standin,
    standin,
    standin_bundle,
    standin_environment,
    standin_plans,
)

if TYPE_CHECKING:
    from tests.vaes import Vaes

ROOT = Path(__file__).parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

settings.register_profile("the same examples in every run", derandomize=True)
settings.load_profile("the same examples in every run")


_modules_frozen = 0


def pytest_runtest_setup() -> None:
    """Do once a process what torch's exporter and the garbage collector would repeat in every export."""
    global _modules_frozen
    for name, module in list(sys.modules.items()):
        if name.startswith("onnxscript._framework_apis.torch_"):
            operators = getattr(module, "get_torchlib_ops", None)
            if operators is not None and not hasattr(operators, "cache_info"):
                module.get_torchlib_ops = functools.cache(operators)  # it parses the source of 500 operators
    if len(sys.modules) > _modules_frozen + 500:  # torch or diffusers is new: 600,000 objects that stay
        gc.collect()
        gc.freeze()  # every collection would visit them, half a second each
        _modules_frozen = len(sys.modules)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by name (tests/checkpoints.py), saved once. Read-only: copy it to change it."""

    def saved(name: str) -> Path:
        from tests.checkpoints import SAVE

        return _made_once(tmp_path_factory, f"tiny-{name}", SAVE[name])

    return saved


@pytest.fixture(scope="session")
def tiny_pixart(checkpoint: Callable[[str], Path]) -> Path:
    """A PixArt checkpoint saved by PixArtAlphaPipeline.save_pretrained."""
    return checkpoint("pixart")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's float16 bundle. Read-only: copy it before changing anything."""
    return _export(tmp_path_factory, "demo-l9-fp16", precision="float16")


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path) -> Path:
    """`demo_bundle` with a TensorRT-RTX engine for sm_89. Read-only."""
    from ditf.engines.build import build
    from ditf.engines.compile import BuildOptions
    from ditf.runtime.backends.flavour import FLAVOURS, load_flavour
    from ditf.runtime.bundles.bundle import Bundle

    def make(path: Path) -> None:
        bundle = Bundle.open(shutil.copytree(demo_bundle, path))
        build(bundle, FLAVOURS["tensorrt-rtx"], load_flavour("tensorrt-rtx"), BuildOptions("sm_89"))

    return _made_once(tmp_path_factory, "demo-l9-fp16-sm89", make)


@pytest.fixture(scope="session")
def demo_bundle_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's float32 bundle, with a batch of 3."""
    return _export(tmp_path_factory, "demo-l9-fp32", precision="float32", batch=3)


@pytest.fixture(scope="session")
def bfloat16_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pixart: Path) -> Path:
    """A bfloat16 bundle of the tiny PixArt, whose VAE has convolutions."""
    return _export(
        tmp_path_factory,
        "pixart-l2-bf16",
        model=str(tiny_pixart),
        layer="2",
        precision="bfloat16",
        size=(48, 80),
    )


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's int8 bundle, three layers of it."""
    return _export(tmp_path_factory, "demo-l3-int8", precision="int8", layer="3", size=(64, 64))


@pytest.fixture(scope="session")
def pixart_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pixart: Path) -> Path:
    """A float16 bundle of the tiny PixArt, with noise as an input and a dynamic batch, not square."""
    return _export(
        tmp_path_factory,
        "pixart-l2-fp16",
        model=str(tiny_pixart),
        layer="2",
        precision="float16",
        size=(48, 80),
        noise="input",
        ensemble=3,
        batch="dynamic",
    )


@pytest.fixture(scope="session")
def bank_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """A float16 bank of the tiny FLUX: two prompts at two timesteps, single-stream blocks, dynamic batch."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("cat: a cat\ndog: a dog\n")
    return _export(
        tmp_path_factory,
        "flux-bank",
        model=str(checkpoint("flux")),
        layer="single.1",
        precision="float16",
        size=(48, 80),
        conditioning="bank",
        prompts=prompts,
        timestep=(90, 260),
        batch="dynamic",
    )


@pytest.fixture(scope="session")
def live_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """A float16 live bundle of the tiny FLUX."""
    return _export(
        tmp_path_factory,
        "flux-live",
        model=str(checkpoint("flux")),
        layer="2",
        precision="float16",
        size=(48, 80),
        conditioning="live",
        prompt=("a cat", "a dog"),
    )


@pytest.fixture(scope="session")
def trimmed_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """A float32 bundle of the tiny SD3.5 that keeps 16 of 256 T5 tokens."""
    return _export(
        tmp_path_factory,
        "sd35-trimmed",
        model=str(checkpoint("sd35")),
        layer="2",
        size=(48, 80),
        text_tokens=16,
    )


@pytest.fixture(scope="session")
def vaes(tmp_path_factory: pytest.TempPathFactory, tiny_pixart: Path) -> Vaes:
    """A checkpoint and encoders for --vae. Read-only."""
    from tests.vaes import Vaes, save_vaes

    return Vaes.under(_made_once(tmp_path_factory, "vaes", lambda path: save_vaes(path, tiny_pixart)))


@pytest.fixture(scope="session")
def swapped_bundle(tmp_path_factory: pytest.TempPathFactory, vaes: Vaes) -> Path:
    """A float16 bundle of a PixArt whose images an AutoencoderTiny encodes."""
    return _export(
        tmp_path_factory,
        "pixart-tiny",
        model=str(vaes.checkpoint),
        vae=str(vaes.tiny),
        layer="2",
        precision="float16",
        size=(64, 64),
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path) -> Path:
    """A bundle whose engine fails, or takes its time, when an image says so. Read-only."""
    from tests.runtime.serving.tiny import tiny_bundle

    return _made_once(tmp_path_factory, "tiny", lambda path: tiny_bundle(demo_bundle, path))


@pytest.fixture
def ditf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs `ditf ARGUMENTS` in an empty directory, in this process: importing torch takes seconds."""
    from ditf.cli.main import run

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = run([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def _export(factory: pytest.TempPathFactory, name: str, **options: object) -> Path:
    from ditf.export.exporter import export_bundle
    from ditf.export.planning.export_options import ExportOptions

    return _made_once(factory, name, lambda path: export_bundle(ExportOptions(output=path, **options)))


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that the first of pytest-xdist's processes to ask for makes, for all of them."""
    own = factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made" / name
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            working = path.with_name(f".{name}") / name  # whoever fails leaves none behind
            working.parent.mkdir(exist_ok=True)
            make(working)
            working.rename(path)
    return path
