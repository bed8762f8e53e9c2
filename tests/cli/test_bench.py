from __future__ import annotations

import json

import pytest

QUICK = ("--seconds", "0.05", "--repetitions", "3", "--points", "5", "--image-size", "60x80")


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """--json of one run, and what it printed."""
    from ditf.cli.main import run

    folder = tmp_path_factory.mktemp("bench")
    bundle = request.getfixturevalue("pixart_bundle")
    assert run(["bench", str(bundle), *QUICK, "--json", str(folder / "b.json")]) == 0
    return folder / "b.json"


@pytest.fixture
def edited(measured, tmp_path):
    """The same with every timing scaled."""

    def edit(scale=1.0, **changes):
        document = json.loads(measured.read_text())
        for row in document["rows"].values():
            row["samples"] = [[value * scale for value in one] for one in row["samples"]]
        document.update(changes)
        path = tmp_path / "baseline.json"
        path.write_text(json.dumps(document))
        return path

    return edit


def test_every_part_is_measured(measured):
    document = json.loads(measured.read_text())
    assert (document["schema"], document["ok"], document["gates"]) == (1, True, [])
    assert set(document["rows"]) == {"preprocess", "features", "match", "end to end"}
    for row in document["rows"].values():
        assert 0 < row["min"] <= row["p50"] <= row["p90"] <= row["p95"] <= row["p99"] <= row["max"]
        assert row["clock"].startswith("host clock")
    rows = document["rows"]
    assert rows["end to end"]["min"] > rows["features"]["min"]
    assert document["memory_bytes"]["peak"] > document["memory_bytes"]["start"] > 0
    assert document["machine"]["versions"]["numpy"]
    assert document["load_seconds"] > 0
    assert len(document["bundle_sha256"]) == 64


def test_a_baseline_that_was_faster(ditf, pixart_bundle, edited, tmp_path):
    done = ditf("bench", pixart_bundle, *QUICK, "--baseline", edited(0.01), "--json", tmp_path / "now.json")
    assert done.returncode == 1, done.stderr
    assert "slower than" in done.stderr
    assert "SLOWER" in done.stdout
    document = json.loads((tmp_path / "now.json").read_text())
    assert not document["ok"]
    gate = next(gate for gate in document["gates"] if gate["name"] == "features p50 ratio")
    assert gate["value"] > gate["limit"] == pytest.approx(1.1)
    assert not gate["ok"]


def test_a_baseline_that_was_slower(ditf, pixart_bundle, edited):
    done = ditf("bench", pixart_bundle, *QUICK, "--baseline", edited(100), "--max-regression", "5%")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": {"cpu": "another"}}, "was measured on cpu another"),
        ({"backend": "tensorrt"}, "was measured with tensorrt, this is onnxruntime"),
        ({"points": 6}, "was measured with --points 6, this is 5"),
        ({"image_size": None}, "was measured with --image-size None"),
        ({"schema": 2}, "is no --json of ditf bench"),
        ({"rows": {}}, "is no --json of ditf bench"),
        ({"rows": 3}, "is no --json of ditf bench"),
        ({"rows": {"features": {"clock": "x", "samples": [[1e999]]}}}, "is no --json of ditf bench"),
        ({"rows": {"features": {"clock": "x", "samples": [[0]]}}}, "is no --json of ditf bench"),
    ],
)
def test_a_baseline_that_says_nothing(ditf, pixart_bundle, edited, changes, message):
    done = ditf("bench", pixart_bundle, *QUICK, "--baseline", edited(**changes))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "none.json"], "no such file"),
        (["--max-regression", "10"], "is not a percentage"),
        (["--against", "jax"], "unknown peer 'jax'"),
        (["--image-size", "0x1"], "is not HxW"),
        (["--repetitions", "2"], "repetitions"),
        (["--points", "0"], "points"),
        (["--image-size", "99999x99999"], "too large to draw"),
        (["--model", "x"], "--model is for --against"),
        (["--seconds", "0"], "seconds"),
        (["--plot", "x.txt"], "no PNG"),
    ],
)
def test_bad_options(ditf, pixart_bundle, arguments, message):
    done = ditf("bench", pixart_bundle, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_peers_and_picture(ditf, demo_bundle, tmp_path):
    arguments = (
        "--against",
        "eager,onnxruntime",
        "--plot",
        tmp_path / "b.png",
        "--json",
        tmp_path / "b.json",
    )
    done = ditf("bench", demo_bundle, *QUICK, *arguments)
    assert done.returncode == 0, done.stderr
    assert "features, eager:" in done.stdout
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["against"]["eager"]["ratio"] > 0
    assert "float32" in document["against"]["eager"]["detail"]
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_a_peer_whose_checkpoint_is_gone(ditf, pixart_bundle, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it retries for 20 s
    done = ditf("bench", pixart_bundle, *QUICK, "--against", "eager", "--model", "no/such")
    assert done.returncode == 3
    assert "no/such: no such directory, and the hub cannot be reached" in done.stderr
