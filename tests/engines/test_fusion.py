"""What TensorRT-RTX makes of each family's blocks: a change of a graph that undoes a fusion fails here.

Geometries are those of tests/engines/trunks.py. One target stands for all in most families: the counts were
the same for all targets of DiT, SD3, SD3.5, FLUX.1, FLUX.2 and AuraFlow.
"""

from __future__ import annotations

import pytest

from ditf.runtime.backends.flavour import PORTABLE, TARGETS
from tests.engines.reports import copies, report_of, unfused
from tests.engines.trunks import TRUNKS, write_trunk

EXPECTED = {
    # model: (fused attentions, kernels of the trunk that only move data, or add a bias as they do)
    # The query's bias is added as the heads are laid out: one kernel a block.
    "DiT-XL/2 512": (2, 2),
    "PixArt-XL/2 512": (2, 2),
    # Text and image meet in one attention: query, key and value are joined and the result is cut, unless
    # the norm of query and key, a kernel of its own, does it on the way. Nobody reads the last block's text.
    "SD3 medium": (2, 7),
    "SD3.5 medium": (3, 3),  # its first block has a second attention
    "SD3.5 large": (2, 3),
    "FLUX.1-dev": (4, 6),  # a single block's value is laid out, or its attention and MLP are joined
    "Chroma1-HD": (4, 6),
    "FLUX.2 [klein] 4B": (4, 5),
    "AuraFlow": (4, 4),
    # Two refined blocks follow one refiner's. Keys and values are repeated for the groups of heads.
    "Lumina-Image 2.0": (3, 6),
    "Z-Image-Turbo": (3, 0),
}
CROSS = {"PixArt-XL/2 512": 2}
"""Attentions without a fused kernel: constant keys are folded into the query, so the logits are a linear."""


@pytest.fixture(scope="module", params=TRUNKS)
def trunk(request, tmp_path_factory):
    layer, changes = TRUNKS[request.param]
    return request.param, write_trunk(tmp_path_factory.mktemp("trunk"), request.param, layer, changes)


def test_one_attention_kernel_and_no_more_copies(trunk):
    name, path = trunk
    report = report_of(path, "sm_89")
    attentions = report.kernels["float16 fused attention"]
    assert (attentions, len(copies(report))) == EXPECTED[name], copies(report)
    assert len(unfused(report)) == CROSS.get(name, 0)
    # The one float32 product of a block: PixArt's query reads the residual before any norm.
    assert report.kernels.get("float32 product", 0) == CROSS.get(name, 0)
    assert "cast" not in report.kernels


@pytest.mark.parametrize("target", [target for target in (*TARGETS, PORTABLE) if target != "sm_89"])
def test_every_target_fuses_the_same(target, single_stream):
    report = report_of(single_stream, target)
    assert report.kernels["float16 fused attention"] == 2
    assert unfused(report) == []
    assert len(copies(report)) == 2, copies(report)


@pytest.fixture(scope="module")
def single_stream(tmp_path_factory):
    name = "DiT-XL/2 512"
    return write_trunk(tmp_path_factory.mktemp("dit"), name, *TRUNKS[name])
