from __future__ import annotations

import json

import pytest


def test_creatures(ditf, demo_bundle, tmp_path):
    done = ditf("eval", "creatures", demo_bundle, "--pairs", "6", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "e.json").read_text())
    assert (document["schema"], document["ok"], document["benchmark"]) == (1, True, "creatures")
    assert list(document["pck"]) == ["0.05", "0.1", "0.15"]
    assert 0 <= document["pck"]["0.05"] <= document["pck"]["0.1"] <= document["pck"]["0.15"] <= 1
    assert document["pck"]["0.1"] == pytest.approx(sum(document["by_keypoint"].values()) / 10)
    assert "in species" in done.stdout
    assert "across species" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["spair-71"], "unknown benchmark 'spair-71'"), (["creatures", "--pairs", "0"], "pairs")],
)
def test_bad_options(ditf, demo_bundle, arguments, message):
    done = ditf("eval", arguments[0], demo_bundle, *arguments[1:])
    assert done.returncode == 2
    assert message in done.stderr
