"""What an export is predicted to need, and that it is said before anything starts."""

from __future__ import annotations

import pytest

from ditf.calib import memory as machine_memory
from ditf.calib.memory import available_bytes
from ditf.export.estimate import estimate
from ditf.export.estimate.estimate import Estimate
from ditf.export.estimate.published_configs import open_configs
from ditf.export.exporter import export_bundle
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs
from ditf.runtime.errors import InputError

GB = 10**9


def estimate_of(folder, **options):
    with open_configs(str(folder)) as checkpoint:
        return Estimate(plan_from_configs(ExportOptions(model=str(folder), layer="2", **options), checkpoint))


def test_activations_grow_with_size_and_ensemble(checkpoint):
    folder = checkpoint("flux")
    small, large, many = (
        estimate_of(folder, **options).stage_bytes
        for options in ({"size": (64, 64)}, {"size": (256, 256)}, {"size": (64, 64), "ensemble": 8})
    )
    assert small.keys() == large.keys() == many.keys()
    graph = "running the graph"
    assert large[graph] > 4 * small[graph]  # logits grow with the square of the tokens
    assert many[graph] > 2 * small[graph]
    assert small["folding the weights"] == large["folding the weights"]


def test_what_does_not_run_needs_nothing(checkpoint):
    stages = estimate_of(checkpoint("flux"), golden="none", discard="none").stage_bytes
    assert "running the unmodified model" not in stages
    assert "running the text encoders" in stages
    assert "running the text encoders" not in estimate_of(checkpoint("dit")).stage_bytes


def test_too_little_memory_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10**6)
    options = ExportOptions(
        model=str(checkpoint("dit")), layer="1", size=(64, 64), ensemble=2, output=tmp_path / "b"
    )
    with pytest.raises(InputError, match=r"needs about .* GB of memory, and 0\.0 GB are") as caught:
        export_bundle(options)
    assert "a smaller --size or --ensemble 1" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_where_nobody_says_nothing_is_checked(checkpoint, monkeypatch):
    monkeypatch.setattr(estimate, "available_bytes", lambda: None)
    estimate_of(checkpoint("dit")).check_memory()


def test_this_machine_says():
    found = available_bytes()
    assert found is not None
    assert 10**7 < found < 10**14


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, None),
        (
            {
                "memory.max": str(4 * GB),
                "memory.current": str(3 * GB),
                "memory.stat": f"anon 7\ninactive_file {GB}\n",
            },
            2 * GB,
        ),
        ({"memory.max": str(GB), "memory.current": str(2 * GB), "memory.stat": "anon 7"}, 0),
    ],
    ids=["none", "unlimited", "limited", "over"],
)
def test_a_container(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine_memory._container(tmp_path) == expected


@pytest.mark.parametrize(("precision", "graphs"), [("float32", 1), ("float16", 2)])
def test_a_graph_is_assembled_once_for_each_precision(checkpoint, monkeypatch, precision, graphs):
    calls = []

    def assemble_shapes(plan, condition=None):
        calls.append(plan.precision)
        return original(plan, condition)

    original = estimate.assemble_shapes
    monkeypatch.setattr(estimate, "assemble_shapes", assemble_shapes)
    found = estimate_of(checkpoint("dit"), precision=precision)
    for figure in ("work", "memory_bytes", "bundle_bytes", "written_bytes", "stage_bytes", "parameters"):
        assert getattr(found, figure)
    found.check_memory()
    assert len(calls) == graphs


def test_disk_for_the_scratch_file(checkpoint):
    """Of a 16-bit export the weights are once in float32, before there is a bundle."""
    folder = checkpoint("flux")
    plain, half, bank = (
        estimate_of(folder, **options)
        for options in ({}, {"precision": "float16"}, {"conditioning": "bank", "timestep": (90, 260)})
    )
    weights = plain.bundle_bytes - half.bundle_bytes  # half of those in float32
    assert plain.written_bytes > plain.bundle_bytes + weights
    assert half.written_bytes > 2 * weights
    assert bank.written_bytes > plain.written_bytes  # the AdaLN linears, read once for all rows
