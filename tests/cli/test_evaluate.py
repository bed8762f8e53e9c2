from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ditf as runtime
from ditf.calib.eval.correspondence import Criteria, evaluate_pairs
from ditf.calib.eval.datasets.spair import read_spair
from ditf.calib.eval.outcomes import totals
from tests.calib.eval import miniature, published

ALPHAS = ("0.05", "0.1", "0.3")
SHARES = tuple(part for alpha in ALPHAS for part in ("--alpha", alpha))


@pytest.fixture(scope="module")
def spair(tmp_path_factory):
    """Read-only: copy it before changing anything."""
    return miniature.spair(tmp_path_factory.mktemp("datasets"), ("cat", "dog"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_spair(tmp_path):
    return miniature.spair(tmp_path / "own")


def measured(path):
    return json.loads(path.read_text())


def test_creatures(ditf, demo_bundle, tmp_path):
    done = ditf("eval", "creatures", demo_bundle, "--pairs", "4", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    assert (document["schema"], document["ok"], document["benchmark"]) == (1, True, "creatures")
    assert list(document["pck"]) == ["0.05", "0.1", "0.15"]
    assert 0 <= document["pck"]["0.05"] <= document["pck"]["0.1"] <= document["pck"]["0.15"] <= 1
    assert document["pck"]["0.1"] == pytest.approx(sum(document["by_keypoint"].values()) / 10)
    assert list(document["groups"]) == ["in species", "across species"]
    assert document["groups"]["in species"]["pck"] == document["pck"]
    assert "in species" in done.stdout
    assert "across species" in done.stdout


def test_spair_equals_the_published_protocol(ditf, demo_bundle, spair, tmp_path):
    """From the command line to the JSON, with the real model's features upsampled in torch."""
    arguments = ("eval", "spair-71k", demo_bundle, "--data", spair, *SHARES, "--cache", tmp_path / "cache")
    pictures = ("--pictures", tmp_path / "pictures")
    done = ditf(*arguments, "--json", tmp_path / "e.json", *pictures)
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    maps = {}
    with runtime.load(demo_bundle) as model:

        def features(path, category):
            if path not in maps:
                maps[path] = model.features(miniature.pixels(path))
            return maps[path]

        for alpha in ALPHAS:
            wanted = published.spair(spair, features, float(alpha)).document()
            assert document["pck"][alpha] == wanted["pck"]
            assert document["pck_per_image"][alpha] == wanted["pck_per_image"]
            assert document["category_mean"]["pck"][alpha] == pytest.approx(wanted["mean"], abs=1e-15)
            assert document["by_category"]["cat"]["pck"][alpha] == wanted["by_category"]["cat"]
    assert document["pairs"] == 5
    assert f"{document['pck']['0.1']:.1%}" in done.stdout
    assert "features: 6 computed, 0 read" in done.stderr  # ten images, six of them different

    listed = measured(tmp_path / "pictures" / "index.json")["pictures"]
    values = [entry["value"] for entry in listed]
    assert values == sorted(values)  # failures first
    assert len(values) == 5
    for entry in listed:
        with Image.open(tmp_path / "pictures" / entry["file"]) as image:
            assert image.width > image.height > 50

    again = ditf(*arguments, "--json", tmp_path / "f.json", *pictures)
    assert "features: 0 computed, 6 read" in again.stderr
    assert measured(tmp_path / "f.json") == document
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_compare_and_sweep(ditf, demo_bundle, bank_bundle, spair, cache, tmp_path):
    one, two = demo_bundle, bank_bundle
    common = ("--data", spair, *SHARES, "--cache", cache)
    done = ditf("eval", "spair-71k", one, *common, "--compare", two, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    comparison = document["comparison"]
    found = comparison["difference"]["pck"]["0.3"]
    assert (comparison["bundle"], comparison["other"]) == (str(one), str(two))
    assert found["low"] <= found["value"] <= found["high"]
    assert found["units"] == "5 pairs"
    assert "95 % interval" in done.stdout

    done = ditf("eval", "spair-71k", one, two, *common, "--json", tmp_path / "f.json")
    assert done.returncode == 0, done.stderr
    sweep = measured(tmp_path / "f.json")
    assert [entry["bundle"] for entry in sweep["bundles"]] == [str(one), str(two)]
    assert sweep["pck"] == sweep["bundles"][0]["pck"] == document["pck"]
    difference = sweep["bundles"][0]["pck"]["0.3"] - sweep["bundles"][1]["pck"]["0.3"]
    assert found["value"] == pytest.approx(difference, abs=1e-15)
    assert two.name in done.stdout


def test_stereo_gates_on_accuracy(ditf, demo_bundle, cache, tmp_path):
    kept = ("--cache", cache)
    done = ditf("eval", "stereo", demo_bundle, *kept, "--min-pck", "0.1=0.2", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    (gate,) = document["gates"]
    assert (gate["name"], gate["limit"], gate["ok"]) == ("pck@0.1", 0.2, True)
    assert gate["value"] == document["pck"]["0.1"]
    assert list(document["pck_px"]) == ["1", "3", "5"]
    assert 0 < document["epe"] < 200
    strict = ("--alpha", "0.01", "--min-pck", "0.01=0.9")
    done = ditf("eval", "stereo", demo_bundle, *kept, *strict, "--json", tmp_path / "e.json")
    assert done.returncode == 1
    assert "pck@0.01" in done.stderr
    assert not measured(tmp_path / "e.json")["ok"]


def test_prompts_by_category(ditf, bank_bundle, spair, tmp_path):
    """The condition of each pair is its category's."""
    arguments = ("eval", "spair-71k", bank_bundle, "--data", spair, *SHARES)
    done = ditf(*arguments, "--prompt", "{category}@90", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    with runtime.load(bank_bundle) as model:
        for alpha in ALPHAS:
            tally = published.spair(
                spair,
                lambda path, category: model.features(miniature.pixels(path), prompt=f"{category}@90"),
                float(alpha),
            )
            assert document["pck"][alpha] == tally.per_point()
    done = ditf(*arguments, "--prompt", "a {category}")
    assert done.returncode == 2
    assert "has no condition 'a cat', 'a dog'" in done.stderr


@pytest.mark.parametrize("method", ["window", "kernel"])
def test_other_methods(ditf, demo_bundle, spair, cache, tmp_path, method):
    arguments = ("eval", "spair-71k", demo_bundle, "--data", spair, *SHARES, "--cache", cache)
    done = ditf(*arguments, "--method", method, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    assert document["method"] == method
    with runtime.load(demo_bundle) as model:

        def match(pair):
            source, target = (model.features(miniature.pixels(path)) for path in pair.images)
            return model.match(source, target, pair.queries(source.image_size), method=method).points

        items = read_spair(spair, "test").items
        wanted = totals(evaluate_pairs(items, match, Criteria([float(alpha) for alpha in ALPHAS])))
    assert document["pck"] == wanted["pck"]


def test_missing_data_is_listed_and_may_be_left_out(ditf, demo_bundle, own_spair, tmp_path):
    sorted((own_spair / "JPEGImages" / "cat").glob("*.jpg"))[0].unlink()
    sorted((own_spair / "PairAnnotation" / "test").glob("*.json"))[-1].write_text("{")
    arguments = ("eval", "spair-71k", demo_bundle, "--data", own_spair, "--json", tmp_path / "e.json")
    done = ditf(*arguments)
    assert done.returncode == 1
    assert "no such image (2 pairs)" in done.stderr
    assert "3 of 5 items cannot be used, for 2 reasons" in done.stderr
    document = measured(tmp_path / "e.json")
    assert not document["ok"]
    assert document["skipped"] == sum(problem["pairs"] for problem in document["problems"]) == 3
    done = ditf(*arguments, "--skip-missing")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    assert (document["ok"], document["pairs"], document["skipped"]) == (True, 2, 3)


def test_nothing_left(ditf, demo_bundle, own_spair):
    for path in own_spair.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    done = ditf("eval", "spair-71k", demo_bundle, "--data", own_spair, "--skip-missing")
    assert done.returncode == 2
    assert "5 of 5 items" in done.stderr


def test_a_limit_takes_part_of_what_a_larger_one_takes(ditf, demo_bundle, spair, cache, tmp_path):
    chosen = {}
    for limit in (1, 3, 99):
        pictures = tmp_path / f"pictures-{limit}"
        done = ditf(
            "eval", "spair-71k", demo_bundle, "--data", spair, "--limit", limit,
            "--pictures", pictures, "--cache", cache,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        chosen[limit] = {entry["name"] for entry in measured(pictures / "index.json")["pictures"]}
    assert [len(names) for names in chosen.values()] == [1, 3, 5]
    assert chosen[1] < chosen[3] < chosen[99]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spair-71", "."], "unknown benchmark 'spair-71'"),
        (["creatures", "--pairs", "0"], "pairs"),
        (["creatures", "--data", "."], "creatures needs no data"),
        (["creatures", "--limit", "3"], "--pairs"),
        (["spair-71k"], "spair-71k needs its data"),
        (["spair-71k", "--data", "none"], "PairAnnotation/test is not there"),
        (["spair-71k", "--data", "."], "is not there"),
        (["spair-71k", "--data", ".", "--pairs", "3"], "--limit"),
        (["pf-willow", "--data", "none"], "none is not there"),
        (["pf-willow", "--data", ".", "--split", "trn"], "no split 'trn'"),
        (["stereo", "--alpha", "-1"], "must be positive"),
        (["stereo", "--alpha", "nan"], "must be positive"),
        (["hpatches", "--data", ".", "--alpha", "0.1"], "has no alpha"),
        (["stereo", "--min-pck", "0.1"], "not ALPHA=VALUE"),
        (["stereo", "--min-pck", "0.1=61"], "not ALPHA=VALUE"),
        (["stereo", "--min-pck", "0.2=0.5"], "stereo measures 0.01, 0.05, 0.1"),
        (["davis", "--data", ".", "--min-pck", "0.1=0.5"], "davis measures J&F, J, F"),
        (["hpatches", "--data", ".", "--min-pck", "2=0.5"], "hpatches measures 1, 3, 5"),
        (["stereo", "--method", "best"], "unknown method 'best'"),
        (["tss", "--data", ".", "--method", "window"], "--method applies to points"),
        (["stereo", "--compare", "none"], "none: no such bundle"),
        (["stereo", "{bundle}"], "is named twice"),
        (["stereo", "--compare", "{bundle}"], "is named twice"),
        (["stereo", "--pictures", "full"], "holds something else"),
        (["stereo", "--pictures", "full/file"], "is not a directory"),
        (["stereo", "--cache", "full/file"], "is not a directory"),
        (["stereo", "--json", "full"], "is a directory"),
        (["stereo", "--prompt", "a {category}"], "no condition 'a motorcycle'"),
    ],
)
def test_bad_options(ditf, demo_bundle, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    rest = [demo_bundle if argument == "{bundle}" else argument for argument in arguments[1:]]
    done = ditf("eval", arguments[0], demo_bundle, *rest)
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "full" / "file").read_text() == "kept"


def test_hpatches(ditf, demo_bundle, tmp_path):
    folder = miniature.hpatches(tmp_path)
    arguments = ("eval", "hpatches", demo_bundle, "--data", folder, "--limit", "4", "--min-pck", "3=0")
    done = ditf(*arguments, "--json", tmp_path / "e.json", "--pictures", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    accuracy = measured(tmp_path / "e.json")["homography_accuracy"]
    assert list(accuracy) == ["1", "3", "5"]
    assert 0 <= accuracy["1"] <= accuracy["3"] <= accuracy["5"] <= 1


def test_davis(ditf, demo_bundle, tmp_path):
    folder = miniature.davis(tmp_path)
    arguments = ("eval", "davis", demo_bundle, "--data", folder, "--limit", "1", "--min-pck", "J&F=0")
    done = ditf(*arguments, "--json", tmp_path / "e.json", "--pictures", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    found = measured(tmp_path / "e.json")["davis"]
    assert found["J&F"] == pytest.approx((found["J"] + found["F"]) / 2)
    assert 0 < found["J"] <= 1


def test_tss(ditf, demo_bundle, tmp_path):
    folder = miniature.tss(tmp_path)
    arguments = ("eval", "tss", demo_bundle, "--data", folder, "--limit", "2", "--min-pck", "0.05=0")
    done = ditf(*arguments, "--json", tmp_path / "e.json", "--pictures", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    document = measured(tmp_path / "e.json")
    assert 0 <= document["pck"]["0.05"] <= 1
    assert np.isfinite(document["epe"])
