"""How a plan's bytes reach TensorRT."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import pytest

from ditf.runtime.backends.flavour import Log, load_flavour
from ditf.runtime.backends.plan_loading import invalidity, plan_content
from ditf.runtime.bundles.signing import ANYONE, Trust
from ditf.runtime.files.hashed import HashedFile


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "features.plan"
    path.write_bytes(b"no plan" * 100)
    return HashedFile(path, 700, hashlib.sha256(path.read_bytes()).hexdigest(), "build it again")


def test_a_plan_is_mapped(plan):
    """TensorRT-RTX takes the mapping as it takes bytes; its query needs no GPU."""
    trt = load_flavour("tensorrt-rtx")
    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    with plan_content(plan, ANYONE) as content:
        assert isinstance(content, mmap.mmap)
        assert "MALFORMED_ENGINE" in invalidity(trt, runtime, content)
    del runtime


def test_a_plan_that_must_be_signed_is_read_once(plan):
    """What is written in place after the check shows in a mapping."""
    with plan_content(plan, Trust(signers=Path("keys"))) as content:
        plan.path.write_bytes(b"another" * 100)
        assert bytes(content) == b"no plan" * 100
