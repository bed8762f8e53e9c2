"""Scratch memory, rounding and advice, which need no compiler."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from ditf.engines import build
from ditf.engines.compile import BuildOptions, Compiled
from ditf.engines.profiles import advice, batch_profiles, features_options, limit_workspace
from ditf.runtime.backends.flavour import FLAVOURS, load_flavour
from ditf.runtime.backends.gpu import Gpu
from ditf.runtime.bundles.bundle import FEATURES, MATCH, Bundle

ORIN = Gpu("NVIDIA Orin", "sm_87", 12060, 8, integrated=True)
SHARE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
L4 = Gpu("NVIDIA L4", "sm_89", 13000, 58)


@pytest.mark.parametrize(("asked", "features"), [(None, SHARE), (5, 5)])
def test_scratch_memory_is_limited_where_gpu_and_cpu_share_theirs(
    monkeypatch, demo_bundle, tmp_path, asked, features
):
    """With a GPU that is described and not there, and a compiler that only keeps its options."""
    bundle = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    given, said = [], []

    def compiler(trt, graph, options, *rest):
        given.append(options.workspace)
        return Compiled(b"plan", ())

    monkeypatch.setattr(build, "find_gpu", lambda index=0: ORIN)
    monkeypatch.setattr(build, "compile_plan", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flavour, trt = FLAVOURS["tensorrt"], SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    made = build.build(bundle, flavour, trt, BuildOptions(workspace=asked), report=said.append)
    assert given == [features, SHARE]
    assert made.record.options["workspace"] == features
    assert any("memory that GPU and CPU share" in line for line in said) == (asked is None)


def test_scratch_memory_is_not_limited_elsewhere():
    for gpu, options in ((L4, BuildOptions()), (None, BuildOptions("sm_89"))):
        assert limit_workspace(options, gpu) == options


def test_only_the_features_of_a_16_bit_bundle_may_round_to_tf32(
    demo_bundle, demo_bundle_float32, bfloat16_bundle
):
    short, long = Bundle.open(demo_bundle), Bundle.open(demo_bundle_float32)
    assert short.may_round(FEATURES)
    assert Bundle.open(bfloat16_bundle).may_round(FEATURES)
    assert not long.may_round(FEATURES)
    assert not short.may_round(MATCH)
    assert features_options(short, BuildOptions()).tf32
    assert not features_options(long, BuildOptions()).tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_the_builder_is_told(tf32):
    """The flags that the real builder has after the options were set; TF32 is on in a new config."""
    from ditf.engines.compile import _set_options
    from ditf.runtime.backends.flavour import Log

    trt = load_flavour("tensorrt-rtx")
    config = trt.Builder(Log(trt).logger).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)
    _set_options(trt, config, BuildOptions(tf32=tf32))
    assert config.get_flag(trt.BuilderFlag.TF32) is tf32
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_a_float32_bundle_is_told_that_its_attention_is_not_fused(demo_bundle, demo_bundle_float32):
    trt = load_flavour("tensorrt-rtx")
    assert list(advice(Bundle.open(demo_bundle), ((1, 1, 1),), trt)) == []
    (line,) = advice(Bundle.open(demo_bundle_float32), ((3, 3, 3),), trt)
    assert "fuses no float32 attention" in line


def test_the_usual_batch_may_be_the_smallest_or_the_largest(pixart_bundle):
    bundle = Bundle.open(pixart_bundle)
    assert batch_profiles(bundle, [(1, 1, 8)]) == ((1, 1, 8),)
    assert batch_profiles(bundle, [(1, 8, 8)]) == ((1, 8, 8),)
    assert batch_profiles(bundle, [(1, 8)]) == ((1, 1, 1), (8, 8, 8))
