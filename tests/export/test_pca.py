"""--pca and --features-dtype: the unmodified model's features with P applied outside the graph."""

from __future__ import annotations

import numpy as np
import pytest

import ditf as package
from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity
from ditf.calib.projection import project_features
from ditf.cli.check import golden_metrics
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle, stage_count
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime import FeatureMap
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import BundleError, DitfError
from ditf.runtime.matching.points import match_points
from tests.engines.rtx import build_engine
from tests.export.parity import family_named, subjects

BUNDLES = [
    # checkpoint, layer, conditioning, precision, channels, and what else is unusual
    ("dit", "1", "bank", "float32", 6, {"batch": "dynamic", "features_dtype": "float16"}),
    ("pixart", "1", "bake", "float16", 9, {"adaln": False, "discard": (), "size": (48, 80)}),
    ("flux", "1", "live", "int8", 5, {"features_dtype": "float32", "size": (48, 80)}),
]


@pytest.mark.parametrize(("name", "layer", "mode", "precision", "count", "changes"), BUNDLES)
def test_a_projected_bundle(checkpoint, tmp_path, name, layer, mode, precision, count, changes):
    folder = checkpoint(name)
    chosen = {"size": (64, 64), "discard": (3,), **changes}
    options = ExportOptions(
        model=str(folder),
        layer=layer,
        precision=precision,
        conditioning=mode,
        pca=count,
        output=tmp_path / "bundle",
        **subjects(family_named(folder), 1 if mode == "bake" else 2),
        **chosen,
    )
    stages = []
    bundle = export_bundle(options, stages.append)
    assert len(stages) == stage_count(options)
    manifest = read_manifest(bundle)
    assert manifest.channels == count
    assert manifest.pca["of"] == family_named(folder).channels
    assert 0.5 < manifest.pca["energy_held_out"] <= 1
    matrix = Bundle.open(bundle).read_array("projection.npy")
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(count), atol=1e-6)

    plan = make_plan(options, Checkpoint(folder, str(folder)))
    reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, plan.noise())
    settings = FeatureSettings(options.discard, options.discard_stage, options.adaln)
    image = golden_pair(plan.size)[:1]
    cosine = {"float32": 0.999999, "float16": 0.9999, "int8": 0.98}[precision]
    with package.load(bundle) as model:
        for entry in encode(plan.entries, plan.family, plan.checkpoint, plan.guidance):
            reference.under(entry.condition, entry.timestep)
            expected = project_features(
                reference.features(reference.hidden_states(image[0]), settings), matrix
            )
            actual = model.run(image, prompt=entry.name)[0]
            wide = options.features_dtype == "float32" or not options.adaln
            assert actual.dtype == (np.float32 if wide else np.float16) == np.dtype(manifest.features_dtype)
            assert actual.shape == expected.shape
            found = feature_parity(actual.transpose(1, 2, 0), expected.transpose(1, 2, 0))
            assert found["cosine_min"] > cosine
        golden = model.bundle.read_arrays("golden.npz")
        metrics, result = golden_metrics(model, golden)
        maps = [FeatureMap(array, plan.size) for array in result.pair]
        by_graph, by_numpy = (
            match(*maps, golden["points"]) for match in (model.match_with_graph, match_points)
        )
    # match.onnx has the channels. On the larger image of the gate, near ties of random features may differ.
    assert (np.abs(by_graph.points - by_numpy.points) <= 1).all()
    assert metrics["match_graph_agrees"] > 0.9
    height, width = plan.size
    profile = {"image": tuple((n, height, width, 3) for n in (1, 2, 4))} if "batch" in changes else None
    build_engine(bundle / "features.onnx", "sm_89", profile)


@pytest.fixture(scope="module")
def projected(tmp_path_factory):
    """Two layers of the demo model in float16, projected; exported twice."""
    folder = tmp_path_factory.mktemp("projected")
    same = {"precision": "float16", "size": (64, 64), "pca": 24, "command": "the same"}
    return [
        export_bundle(ExportOptions(output=folder / name, layer=name, **same)) for name in ("1", "block.1")
    ]


def test_exporting_twice_gives_the_same_bytes(projected):
    first, second = (read_manifest(bundle) for bundle in projected)
    for name in ("features.onnx", "features.onnx.data", "match.onnx", "projection.npy", "calibration.json"):
        assert first.files[name] == second.files[name], name
    assert first.pca == second.pca


def test_it_is_inspected_and_checked(ditf, projected):
    shown = ditf("inspect", projected[0])
    assert "features float16 [1, 24, 8, 8]" in shown.stdout
    assert "projected to 24 of 128 channels: " in shown.stdout
    done = ditf("check", projected[0], "--ladder", "--bisect")
    assert done.returncode == 0, done.stderr
    assert "bisect: nothing is off" in done.stdout


def test_turing_gets_its_engine(projected):
    """TensorRT-RTX has no float32 matrix product for it; the projection is a convolution."""
    made = build_engine(projected[0] / "features.onnx", "sm_75")
    assert made.plan


def test_another_projection_fails_the_check(projected, tmp_path):
    """Golden features are P times the model's: a bundle whose P is another is not within tolerance."""
    import onnx

    model = onnx.load(projected[0] / "features.onnx")
    weight = next(one for one in model.graph.initializer if one.name == "projection.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[[0, 1]] = array[[1, 0]]
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "features.onnx")
    golden = np.load(projected[0] / "golden.npz")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "features.onnx")
    maps = session.run(None, {"image": golden["images"][:1]})[0]
    rows = maps.reshape(24, -1).T[golden["rows"][0]]
    limits = read_manifest(projected[0]).tolerances
    assert feature_parity(rows, golden["features"][0])["relative_error"] > limits["relative_error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pca": 129}, "--pca 129 is more than the 128 channels of dit; choose 1..128"),
        ({"pca": 25, "size": (16, 16)}, "--pca 25 needs as many tokens, the calibration images have 24"),
    ],
)
def test_projections_that_cannot_be(tmp_path, options, message):
    with pytest.raises(DitfError, match=message) as caught:
        export_bundle(ExportOptions(output=tmp_path / "bundle", **options))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pca", [None, 4])
def test_features_without_margin_are_not_float16(tmp_path, pca):
    """Hidden states with a planted channel of 1e5, neither normed nor discarded."""
    from tests.export.onnx_writing.test_emulation import plant

    model = plant(tmp_path / "planted", "pos_embed.proj", 1e5)
    same = {"model": str(model), "layer": "1", "timestep": 10, "size": (64, 64), "adaln": False, "pca": pca}
    options = ExportOptions(discard="none", features_dtype="float16", output=tmp_path / "b", **same)
    with pytest.raises(DitfError, match=r"features reach 1e\+05.*--features-dtype float32"):
        export_bundle(options)
    assert not (tmp_path / "b").exists()


def test_a_manifest_whose_pca_is_none(projected, tmp_path):
    text = (projected[0] / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"energy_held_out"', '"energy"'))
    with pytest.raises(BundleError, match="pca is"):
        read_manifest(tmp_path)
