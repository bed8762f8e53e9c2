from __future__ import annotations

from dataclasses import replace

import pytest

from ditf.runtime.bundle import Bundle
from ditf.runtime.engines import EngineRecord, sources
from ditf.runtime.gpu import Gpu, version_text

ORIN = Gpu("NVIDIA Orin", "sm_87", 12060)


@pytest.fixture
def bundle(demo_bundle) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture
def record(bundle) -> EngineRecord:
    """Built on an Orin."""
    return EngineRecord(
        schema=1, key="k", flavour="tensorrt", version="10.13.3", target="", gpu=str(ORIN), driver=12060,
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
            Gpu("NVIDIA Thor", "sm_110", 13000),
            "10.13.3",
            "built on NVIDIA Orin sm_87, this GPU is NVIDIA Thor",
        ),
        ({}, replace(ORIN, driver=12020), "10.13.3", "a driver of CUDA 12.6, here it is 12.2"),
        ({}, ORIN, "10.16.1", "built with tensorrt 10.13.3, installed is 10.16.1"),
        ({"options": {"version_compatible": True}}, ORIN, "10.3.0", "installed is 10.3.0"),
        ({"options": {"version_compatible": True}}, ORIN, "11.4.0", "installed is 11.4.0"),
        ({"options": {"hardware_compatible": True}}, Gpu("T4", "sm_75", 13000), "10.13.3", "this GPU is T4"),
        ({"target": "sm_89", "gpu": None}, ORIN, "10.13.3", "built for sm_89, this GPU is NVIDIA Orin sm_87"),
        ({"onnx": {"features.onnx": "0"}}, ORIN, "10.13.3", "built from another features.onnx"),
    ],
)
def test_what_differs_is_named(bundle, record, changes, gpu, version, why):
    assert why in replace(record, **changes).misfit(bundle, gpu, version)


@pytest.mark.parametrize(
    ("changes", "gpu", "version"),
    [
        ({"options": {"version_compatible": True}}, ORIN, "10.16.1"),
        ({"options": {"hardware_compatible": True}}, Gpu("NVIDIA A10", "sm_86", 12060), "10.13.3"),
        ({"target": "portable", "gpu": None, "driver": None}, Gpu("any", "sm_120", 12000), "10.13.3"),
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
