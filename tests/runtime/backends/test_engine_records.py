from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
from PIL import Image

from ditf.cli.main import run
from ditf.cli.support import bundles
from ditf.runtime.backends import flavour
from ditf.runtime.backends.engine_records import (
    PLANS,
    SCHEMA,
    EngineRecord,
    build_command,
    choose_engine,
    sources,
)
from ditf.runtime.backends.flavour import RTX
from ditf.runtime.backends.gpu import Gpu, version_text
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.signing import Trust
from ditf.runtime.errors import BundleError, InputError, MissingComponent

ORIN = Gpu("NVIDIA Orin", "sm_87", 12060, 8, integrated=True)
AGX_ORIN = replace(ORIN, multiprocessors=16)
THOR = Gpu("NVIDIA Thor", "sm_110", 13000, 20, integrated=True)
T4 = Gpu("Tesla T4", "sm_75", 13000, 40)
RTX_4060 = Gpu("NVIDIA GeForce RTX 4060", "sm_89", 13000, 24)
PORTABLE = {"target": "portable", "gpu": None, "driver": None}


@pytest.fixture
def bundle(demo_bundle) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture
def record(bundle) -> EngineRecord:
    """The record of an engine that was built on an Orin."""
    return EngineRecord(
        schema=SCHEMA, key="k", flavour="tensorrt", version="10.13.3", target="", gpu=str(ORIN), driver=12060,
        onnx=sources(bundle), batch=[[1, 1, 1]], options={}, plans={}, left_out={}, seconds={}, peak_bytes=0,
    )  # fmt: skip


def test_it_fits_where_it_was_built(bundle, record):
    assert record.misfit(bundle, ORIN, "10.13.3") == ""
    assert record.misfit(bundle, replace(ORIN, driver=13000), "10.13.3") == ""  # a newer driver


@pytest.mark.parametrize(
    ("changes", "gpu", "version", "why"),
    [
        (
            {},
            THOR,
            "10.13.3",
            "built on NVIDIA Orin sm_87 8 SMs, this GPU is NVIDIA Thor sm_110 20 SMs",
        ),
        ({}, AGX_ORIN, "10.13.3", "built on NVIDIA Orin sm_87 8 SMs, this GPU is NVIDIA Orin sm_87 16 SMs"),
        ({}, replace(ORIN, driver=12020), "10.13.3", "a driver of CUDA 12.6, here it is 12.2"),
        ({}, ORIN, "10.16.1", "built with tensorrt 10.13.3, installed is 10.16.1"),
        ({"options": {"version_compatible": True}}, ORIN, "10.3.0", "installed is 10.3.0"),
        ({"options": {"version_compatible": True}}, ORIN, "11.4.0", "installed is 11.4.0"),
        ({"options": {"hardware_compatible": True}}, T4, "10.13.3", "this GPU is Tesla T4"),
        ({"target": "sm_89", "gpu": None}, ORIN, "10.13.3", "built for sm_89, this GPU is NVIDIA Orin sm_87"),
        (PORTABLE, T4, "10.13.3", "built for portable, which leaves out sm_75"),
        (PORTABLE, ORIN, "10.13.3", "built for portable, which leaves out sm_87"),
        (PORTABLE, THOR, "10.13.3", "built for portable, which leaves out sm_110"),
        (PORTABLE, Gpu("NVIDIA H100", "sm_90", 13000, 132), "10.13.3", "which leaves out sm_90"),
        ({"onnx": {"features.onnx": "0"}}, ORIN, "10.13.3", "built from another features.onnx"),
    ],
)
def test_what_differs_is_named(bundle, record, changes, gpu, version, why):
    assert why in replace(record, **changes).misfit(bundle, gpu, version)


@pytest.mark.parametrize(
    ("changes", "gpu", "version"),
    [
        ({"options": {"version_compatible": True}}, ORIN, "10.16.1"),
        ({"options": {"hardware_compatible": True}}, Gpu("NVIDIA A10", "sm_86", 12060, 72), "10.13.3"),
        *((PORTABLE, replace(RTX_4060, target=f"sm_{one}"), "10.13.3") for one in (80, 86, 89, 120, 121)),
        (PORTABLE, replace(RTX_4060, target="sm_130"), "10.13.3"),  # a later one: TensorRT-RTX decides
        ({"target": "sm_87", "gpu": None, "driver": None}, ORIN, "10.13.3"),
    ],
)
def test_where_else_it_fits(bundle, record, changes, gpu, version):
    assert replace(record, **changes).misfit(bundle, gpu, version) == ""


def test_batches_for_people(record):
    assert record.batch_text == "1"
    assert replace(record, batch=[[1, 4, 8]]).batch_text == "1-8"
    assert replace(record, batch=[[1, 1, 1], [8, 8, 8]]).batch_text == "1 and 8"


def test_cuda_versions():
    assert [version_text(n) for n in (12060, 13000, 11080)] == ["12.6", "13.0", "11.8"]


def written(bundle: Bundle, record: EngineRecord, name: str, **changes: object) -> None:
    """An engine of a bundle with a valid record and invalid plans."""
    key = f"tensorrt-10.13.3-{name}"
    plans = {plan: {"bytes": 1, "sha256": "0" * 64} for plan in PLANS.values()}
    folder = bundle.path / "engines" / key
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(replace(record, key=key, plans=plans, **changes).to_json())


def test_an_engine_with_code_for_the_cpu_is_passed_over(demo_bundle, record, tmp_path):
    """engine.json states that the plan holds host code, but cannot allow it."""
    careful = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    written(careful, record, "a", options={"version_compatible": True})
    with pytest.raises(BundleError, match=r"code of its own on the CPU \(--allow-host-code accepts it\)"):
        choose_engine(careful, "tensorrt", ORIN, "10.13.3")
    trusting = Bundle.open(careful.path, Trust(host_code=True))
    assert choose_engine(trusting, "tensorrt", ORIN, "10.13.3")[1].host_code
    written(careful, record, "b")
    for bundle in (careful, trusting):
        assert not choose_engine(bundle, "tensorrt", ORIN, "10.13.3")[1].host_code


@pytest.mark.parametrize("flag", [[], ["--allow-host-code"]])
def test_the_flag_reaches_the_bundle(demo_bundle, flag, monkeypatch, capsys, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    opened = []

    def refuse(bundle, *rest):
        opened.append(bundle.trust.host_code)
        raise InputError("far enough")

    monkeypatch.setattr(bundles, "Model", refuse)
    picture = str(tmp_path / "a.png")
    assert run(["match", str(demo_bundle), picture, picture, "--points", "1,1", *flag]) == 2
    assert "far enough" in capsys.readouterr().err
    assert opened == [bool(flag)]


def test_an_engine_of_0_1_0_is_built_again(demo_bundle, tmp_path):
    """engine.json as ditf 0.1.0 wrote it on an Orin: TF32 is in its plans, and it may be of another Orin."""
    bundle = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    key = "tensorrt-10.3.0-nvidia-orin-sm-87-b1-0f3a9c1e"
    plans = {plan: {"bytes": 1, "sha256": "0" * 64} for plan in ("features.plan", "match.plan")}
    old = {
        "schema": 1, "key": key, "flavour": "tensorrt", "version": "10.3.0", "target": "",
        "gpu": "NVIDIA Orin sm_87", "driver": 12060, "onnx": sources(bundle), "batch": [[1, 1, 1]],
        "options": {
            "target": None, "level": None, "workspace": None, "hardware_compatible": False,
            "version_compatible": False, "strip_weights": False,
        },
        "plans": plans, "left_out": {}, "seconds": {"features.plan": 61.5, "match.plan": 9.2},
        "peak_bytes": 1234567890,
    }  # fmt: skip
    folder = bundle.path / "engines" / key
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(json.dumps(old, indent=2) + "\n")
    with pytest.raises(BundleError) as caught:
        choose_engine(bundle, "tensorrt", ORIN, "10.3.0")
    assert caught.value.problem.endswith(
        f"{key} was built by ditf 0.1.0, whose plans round float32 products to TF32"
    )
    assert caught.value.fix == f"run: ditf build {bundle.path} --backend tensorrt"


@pytest.mark.parametrize(
    ("gpu", "arguments"),
    [
        (T4, "tensorrt-rtx --target sm_75"),
        (RTX_4060, "tensorrt-rtx"),
        (ORIN, "tensorrt"),
        (THOR, "tensorrt"),
        (Gpu("NVIDIA H100", "sm_90", 13000, 132), "tensorrt"),
    ],
)
def test_the_command_builds_what_runs_there(bundle, record, gpu, arguments):
    """What the command builds fits: no message says to build again what was just built."""
    assert (
        build_command(bundle, "tensorrt-rtx", gpu) == f"run: ditf build {bundle.path} --backend {arguments}"
    )
    library, _, target = arguments.partition(" --target ")
    made = {"target": target or "portable", "gpu": None} if library == RTX else {"gpu": str(gpu)}
    new = replace(record, flavour=library, driver=gpu.driver, **made)
    assert new.misfit(bundle, gpu, record.version) == ""


def test_no_jetson_is_told_to_use_rtx(monkeypatch):
    monkeypatch.setattr(flavour, "find_gpus", lambda: (ORIN,))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingComponent, match="nothing here builds engines") as caught:
        flavour.choose_flavour("auto")
    assert "JetPack" in caught.value.fix
    assert "rtx" not in caught.value.fix
