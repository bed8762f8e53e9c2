"""A repository as Triton reads it: every config parsed by NVIDIA's protobuf, every graph really run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

import ditf
from ditf.calib.images import procedural_image
from ditf.engines import triton
from ditf.engines.pbtxt import Enum, entries, pbtxt
from ditf.engines.triton import bundle_models, check_name, write_models
from ditf.engines.triton_config import Placement
from ditf.engines.triton_plans import choose_plans
from ditf.runtime.backends.engine_records import (
    FEATURES_PLAN,
    MATCH_PLAN,
    RECORD,
    SCHEMA,
    EngineRecord,
    sources,
)
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, InputError
from ditf.runtime.files import stage_folder
from ditf.runtime.serving.protocol.contract import model_specs
from tests.triton_server import ModelError, Server, read_config

CPU = Placement(gpu=False, instances=1, largest_batch=4, usual_batch=4, delay_us=5000)
GPU = replace(CPU, gpu=True)
SIZES = ((60, 80), (50, 70))


@pytest.fixture(scope="module")
def pictures():
    return [procedural_image(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def points():
    return np.array([[3.5, 7.25], [60, 40], [79, 59]], np.float32)


def exported(path, repository, placement, name="cat", plans=None):
    bundle = Bundle.open(path)
    models = bundle_models(bundle, name, placement, plans)
    gone = write_models(repository, bundle, name, models)
    return models, gone


@pytest.mark.parametrize("fixture", ["demo_bundle", "demo_bundle_float32", "pixart_bundle", "bank_bundle"])
@pytest.mark.parametrize("placement", [CPU, GPU], ids=["cpu", "gpu"])
def test_every_model_answers_as_ditf_does(request, tmp_path, fixture, placement, pictures, points):
    path = request.getfixturevalue(fixture)
    exported(path, tmp_path / "models", placement)
    server = Server(tmp_path / "models")
    specs = model_specs(Bundle.open(path).manifest)
    for name, spec in specs.items():  # what clients are told: the contract's tensors
        config = server.configs[f"cat.{name}"]
        for listed, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [one.name for one in listed] == [one.name for one in tensors]
    warm = server.warm_up()
    assert all(np.isfinite(array).all() for results in warm.values() for array in results.values())
    with ditf.load(path) as model:
        images = np.stack([model.fitted(picture).pixels for picture in pictures])
        batch = model.manifest.batch
        if batch == "dynamic" or "features_graph" in " ".join(server.configs):
            given = images
        else:
            given = np.take(images, np.arange(batch), axis=0, mode="wrap")
        expected = model.run(given)
        found = server.infer("cat.features", {"image": given})["features"]
        np.testing.assert_array_equal(found, expected)
        maps = model.features_of(pictures)
        matches = (model.match_with_graph if placement.gpu else model.match)(*maps, points)
        sizes = {
            f"{side}_size": np.array(size) for side, size in zip(("source", "target"), SIZES, strict=True)
        }
        sides = {"source": maps[0].array, "target": maps[1].array}
        for answer in (
            server.infer("cat.correspond", {"source": pictures[0], "target": pictures[1], "points": points}),
            server.infer("cat.match", {**sides, **sizes, "points": points}),
        ):
            np.testing.assert_array_equal(answer["matches"], matches.points)
            np.testing.assert_array_equal(answer["scores"], matches.scores)
    assert ("cat.match_graph" in {name for name, _ in server.calls[-2:]}) == placement.gpu
    server.close()


@pytest.mark.parametrize(
    ("fixture", "placement", "exact"),
    [
        ("demo_bundle", GPU, {"cat.match_graph"}),
        ("demo_bundle_float32", GPU, {"cat.features", "cat.match_graph"}),
        ("demo_bundle_float32", CPU, set()),
    ],
)
def test_float32_products_are_not_rounded_to_tf32(request, fixture, placement, exact):
    """ONNX Runtime's CUDA provider rounds unless it is told otherwise."""
    bundle = Bundle.open(request.getfixturevalue(fixture))
    found = {
        model.name: (accelerator.name, dict(accelerator.parameters))
        for model in bundle_models(bundle, "cat", placement, None)
        for accelerator in _parsed(model.config).optimization.execution_accelerators.gpu_execution_accelerator
    }
    assert found == dict.fromkeys(exact, ("cuda", {"use_tf32": "0"}))


def test_a_dynamic_batch(tmp_path, bank_bundle, pixart_bundle, demo_bundle):
    """Of a graph that takes images alone: with more inputs Triton cannot put requests together."""
    manifest = Bundle.open(demo_bundle).manifest
    dynamic = Bundle(demo_bundle, replace(manifest, batch="dynamic"))
    placement = replace(GPU, largest_batch=8, usual_batch=4, delay_us=2500, instances=3)
    models = {model.name: model for model in bundle_models(dynamic, "cat", placement, None)}
    config = _parsed(models["cat.features"].config)
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [*manifest.size, 3]
    assert list(config.output[0].dims) == [manifest.channels, *manifest.grid]
    assert list(config.dynamic_batching.preferred_batch_size) == []  # of engines alone
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert config.instance_group[0].count == 3
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert [sample.batch_size for sample in config.model_warmup] == [1, 8]
    assert len(models["cat.features"].written["warmup/image"]) == np.prod([*manifest.size, 3])
    for path in (bank_bundle, pixart_bundle):
        config = _parsed(bundle_models(Bundle.open(path), "cat", placement, None)[0].config)
        assert config.max_batch_size == 0
        assert config.input[0].dims[0] == -1
        assert not config.HasField("dynamic_batching")


def test_conditions_and_methods_are_parameters(tmp_path, bank_bundle, pictures, points):
    exported(bank_bundle, tmp_path, GPU)
    server = Server(tmp_path)
    pair = {"source": pictures[0], "target": pictures[1], "points": points}
    with ditf.load(bank_bundle) as model:
        dog = model.conditions[-1]
        maps = model.features_of(pictures, prompt=dog)
        for method in ("argmax", "window"):
            match = model.match_with_graph if method == "argmax" else model.match
            expected = match(*maps, points, *(() if method == "argmax" else (method,)))
            found = server.infer("cat.correspond", pair, {"prompt": dog, "method": method})
            np.testing.assert_array_equal(found["matches"], expected.points)
    for parameters, message in (({"prompt": "a cow"}, "a cow"), ({"method": "best"}, "best")):
        with pytest.raises(ModelError, match=message) as caught:
            server.infer("cat.correspond", pair, parameters)
        assert caught.value.args[0] == 3  # INVALID_ARG: the client's fault


def test_a_bad_request_is_answered_alone(tmp_path, demo_bundle, pictures, points):
    exported(demo_bundle, tmp_path, CPU)
    server = Server(tmp_path)
    pair = {"source": pictures[0], "target": pictures[1]}
    empty = np.zeros((0, 5, 3), np.uint8)
    for changes, message in (
        ({"points": np.array([[80, 0]], np.float32)}, "outside the source image"),
        ({"points": np.array([[np.nan, 0]], np.float32)}, "outside the source image"),
        ({"points": np.zeros((100_001, 2), np.float32)}, "send fewer"),
        ({"points": points, "source": empty}, "source is 0x5"),
    ):
        with pytest.raises(ModelError, match=message):
            server.infer("cat.correspond", {**pair, **changes})
    array = np.zeros((128, 12, 12), np.float16)
    for size in ((0, 10), (1 << 40, 1 << 40), (-5, -5), (8000, 8000)):
        sizes = {"source_size": np.array([10, 10]), "target_size": np.array(size)}
        with pytest.raises(ModelError, match="target_size is"):
            server.infer("cat.match", {"source": array, "target": array, **sizes, "points": points})
    none = server.infer("cat.correspond", {**pair, "points": np.zeros((0, 2), np.float32)})
    assert (none["matches"].shape, none["scores"].shape) == ((0, 2), (0,))


def test_a_graph_that_fails_is_the_servers_fault(tmp_path, demo_bundle, pictures, points, monkeypatch):
    exported(demo_bundle, tmp_path, CPU)
    server = Server(tmp_path)
    infer = server.infer

    def failing(name, *arguments, **options):
        if name == "cat.features":
            raise ModelError(1, "out of memory")
        return infer(name, *arguments, **options)

    monkeypatch.setattr(server, "infer", failing)
    with pytest.raises(ModelError, match=r"cat.features failed \(out of memory\)") as caught:
        server.infer("cat.correspond", {"source": pictures[0], "target": pictures[1], "points": points})
    assert caught.value.args[0] == 1  # INTERNAL


def test_several_bundles_in_one_repository(tmp_path, demo_bundle, bank_bundle):
    foreign = tmp_path / "resnet" / "1"
    foreign.mkdir(parents=True)
    (foreign / "model.onnx").write_text("theirs")
    exported(demo_bundle, tmp_path, GPU, "one")
    exported(bank_bundle, tmp_path, GPU, "two")
    before = _tree(tmp_path)
    assert len({path.split("/")[0] for path in before}) == 1 + 4 + 5
    _, gone = exported(demo_bundle, tmp_path, CPU, "one")
    assert [path.name for path in gone] == ["one.match_graph"]
    after = _tree(tmp_path)
    assert {path: after[path] for path in after if not path.startswith("one.")} == {
        path: before[path] for path in before if not path.startswith("one.")
    }
    assert not (tmp_path / "one.match_graph").exists()
    assert not [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")]


@pytest.mark.parametrize("marker", [None, "{}", '{"bundle": "other"}', "not JSON", '{"bundle": 1}'])
def test_what_is_not_ours_stays(tmp_path, demo_bundle, marker):
    theirs = tmp_path / "cat.match"
    theirs.mkdir()
    (theirs / "config.pbtxt").write_text('backend: "python"')
    if marker is not None:
        (theirs / "ditf.json").write_text(marker)
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="not a model that ditf made of cat"):
        exported(demo_bundle, tmp_path, CPU)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_failure_puts_everything_back(tmp_path, demo_bundle, monkeypatch, exchanging, calls):
    repository = tmp_path / "models"
    exported(demo_bundle, repository, GPU)
    before = _tree(repository)
    swapped = []
    swap = stage_folder.swap

    def failing(new, place, old):
        swapped.append(place)
        if len(swapped) == calls:
            raise OSError(5, "Input/output error")
        return swap(new, place, old)

    monkeypatch.setattr(triton, "swap", failing)
    if not exchanging:
        monkeypatch.setattr(stage_folder, "exchange", lambda one, other: False)
    with pytest.raises(OSError, match="Input/output"):
        exported(demo_bundle, repository, CPU)
    monkeypatch.undo()
    assert _tree(repository) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_model_that_a_killed_export_had_moved_comes_back(tmp_path, demo_bundle, monkeypatch):
    """Where two folders cannot be exchanged in one call; with the next export, even one that fails."""
    repository = tmp_path / "models"
    exported(demo_bundle, repository, CPU)
    before = _tree(repository)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ditf.cli.main import run\n"
        "from ditf.runtime.files import stage_folder\n"
        "stage_folder.exchange = lambda one, other: False\n"
        "rename = Path.rename\n"
        "Path.rename = lambda *paths: (rename(*paths), os.kill(os.getpid(), 9))\n"
        f"run(['export-triton', {str(demo_bundle)!r}, '--repository', {str(repository)!r}, '--name', 'cat',"
        " '--device', 'cpu'])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert len(list(repository.iterdir())) < 3

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "_write", fails)
    with pytest.raises(OSError, match="No space left"):
        exported(demo_bundle, repository, CPU)
    assert _tree(repository) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_altered_files_are_not_served(tmp_path, demo_bundle):
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy)
    with (copy / "features.onnx.data").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="has changed"):
        exported(copy, tmp_path / "models", CPU)
    assert not (tmp_path / "models").exists()


def test_files_that_change_before_they_are_copied_are_not_served(tmp_path, demo_bundle):
    copy = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    models = bundle_models(copy, "cat", CPU, None)
    with (copy.path / "features.onnx.data").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"features\.onnx\.data has changed"):
        write_models(tmp_path / "models", copy, "cat", models)
    assert not list((tmp_path / "models").glob("*"))


def test_names(tmp_path):
    assert check_name("demo-l9_fp16.2") == "demo-l9_fp16.2"
    for name in ("", "a/b", "..", ".hidden", "a b", "ä", "x" * 101, "a\n"):
        with pytest.raises(InputError, match="cannot be in a model's name"):
            check_name(name)


# Plans: their files are stand-ins, since no TensorRT is at hand; which are taken, and the configuration.


@pytest.fixture
def with_engine(tmp_path, demo_bundle):
    """Puts an engine's record and empty plans into a copy of the demo bundle."""
    copy = tmp_path / "demo"
    shutil.copytree(demo_bundle, copy)

    def add(capability, version="10.3.0", flavour="tensorrt", **changes):
        key = f"{flavour}-{version}-{capability}-{len(list(copy.glob('engines/*')))}"
        folder = copy / "engines" / key
        folder.mkdir(parents=True)
        names = changes.pop("plans", (FEATURES_PLAN, MATCH_PLAN))
        for name in names:
            (folder / name).write_bytes(b"")
        empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
        record = EngineRecord(
            schema=SCHEMA, key=key, flavour=flavour, version=version, target="",
            gpu=f"NVIDIA GPU {capability}", driver=12060, onnx=sources(Bundle.open(copy)),
            batch=[[1, 1, 1]], options={}, plans=dict.fromkeys(names, empty), seconds={}, peak_bytes=0,
            left_out={name: "why" for name in (FEATURES_PLAN, MATCH_PLAN) if name not in names},
        )  # fmt: skip
        (folder / RECORD).write_text(replace(record, **changes).to_json())
        return Bundle.open(copy)

    return add


def test_a_plan_for_each_gpu(tmp_path, with_engine):
    with_engine("sm_87")
    bundle = with_engine("sm_110")
    plans = choose_plans(bundle, ())
    models = bundle_models(bundle, "cat", GPU, plans)
    write_models(tmp_path / "models", bundle, "cat", models)
    for name in ("cat.features", "cat.match_graph"):
        config = read_config(tmp_path / "models" / name)
        assert config.platform == "tensorrt_plan"
        assert dict(config.cc_model_filenames) == {
            "8.7": "tensorrt-10.3.0-sm_87-0.plan",
            "11.0": "tensorrt-10.3.0-sm_110-1.plan",
        }
        assert config.default_model_filename == ""  # there is none for other GPUs
        assert list(config.instance_group[0].profile) == ["0"]
        assert {path.name for path in (tmp_path / "models" / name / "1").iterdir()} == {
            *config.cc_model_filenames.values()
        }
    assert read_config(tmp_path / "models" / "cat.correspond").backend == "python"
    assert list(choose_plans(bundle, ["sm_87"]).by_target) == ["sm_87"]


def test_which_engine(with_engine):
    with_engine("sm_89", "10.3.0")
    bundle = with_engine("sm_89", "10.13.3")
    assert choose_plans(bundle, ()).version == "10.13.3"  # the newest, compared as numbers
    bundle = with_engine("sm_80", "10.13.3", options={"hardware_compatible": True})
    plans = choose_plans(bundle, ())
    assert plans.default[1].gpu == "NVIDIA GPU sm_80"
    assert choose_plans(bundle, ["sm_86"]).by_target["sm_86"][1].gpu == "NVIDIA GPU sm_80"
    with pytest.raises(InputError, match="no tensorrt engine for sm_75: it has them for"):
        choose_plans(bundle, ["sm_75"])
    bundle = with_engine("sm_87", "10.3.0")
    with pytest.raises(InputError, match=r"TensorRT 10\.13\.3 and 10\.3\.0, and a Triton has one"):
        choose_plans(bundle, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "tensorrt-rtx", "target": "sm_89", "gpu": None}, "which Triton does not load"),
        ({"onnx": {"features.onnx": "0"}}, "was built from another features.onnx"),
        ({"options": {"strip_weights": True}}, "--strip-weights"),
        ({"batch": [[2, 4, 8], [16, 16, 16]]}, "none of 1; build it with --batch 1,4,8"),
    ],
)
def test_engines_that_triton_cannot_have(with_engine, changes, message):
    with pytest.raises(InputError, match=message):
        choose_plans(with_engine("sm_89", **changes), ())


def test_a_plan_that_was_left_out(with_engine):
    bundle = with_engine("sm_75", plans=(FEATURES_PLAN,))
    models = bundle_models(bundle, "cat", GPU, choose_plans(bundle, ()))
    assert [model.config.get("platform") for model in models[:2]] == ["tensorrt_plan", "onnxruntime_onnx"]


def test_the_profile_that_takes_most(with_engine):
    plans = choose_plans(with_engine("sm_89", batch=[[1, 1, 1], [1, 4, 8], [16, 16, 16]]), ())
    assert (plans.profile, plans.batch) == (1, (4, 8))


def test_preferred_batches_are_an_engines(with_engine):
    opened = with_engine("sm_89", batch=[[1, 4, 8]])
    bundle = Bundle(opened.path, replace(opened.manifest, batch="dynamic"))
    placement = replace(GPU, largest_batch=8, usual_batch=4)
    config = _parsed(bundle_models(bundle, "cat", placement, choose_plans(bundle, ()))[0].config)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.max_batch_size == 8


# Text format


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    name=TEXTS,
    batch=st.integers(0, 2**31 - 1),
    dims=st.lists(st.integers(-1, 2**62)),
    files=st.dictionaries(TEXTS, TEXTS),
    kind=st.sampled_from(["KIND_GPU", "KIND_CPU"]),
    flag=st.booleans(),
)
def test_text_is_what_protobuf_reads(name, batch, dims, files, kind, flag):
    message = {
        "name": name,
        "max_batch_size": batch,
        "input": [{"name": name, "data_type": Enum("TYPE_FP16"), "dims": dims, "optional": flag}, {}],
        "instance_group": [{"kind": Enum(kind), "gpus": []}],
        "cc_model_filenames": entries(files),
        "response_cache": {"enable": flag},
    }
    expected = model_config_pb2.ModelConfig(
        name=name,
        max_batch_size=batch,
        input=[
            model_config_pb2.ModelInput(
                name=name, data_type=model_config_pb2.TYPE_FP16, dims=dims, optional=flag
            ),
            model_config_pb2.ModelInput(),
        ],
        instance_group=[
            model_config_pb2.ModelInstanceGroup(kind=model_config_pb2.ModelInstanceGroup.Kind.Value(kind))
        ],
        cc_model_filenames=files,
        response_cache=model_config_pb2.ModelResponseCache(enable=flag),
    )
    found = _parsed(message)
    assert found == expected
    again = text_format.Parse(text_format.MessageToString(found), model_config_pb2.ModelConfig())
    assert again == expected


def test_a_round_trip_of_every_config(tmp_path, bank_bundle):
    """What is written is what protobuf writes: nothing is lost, nothing said twice."""
    exported(bank_bundle, tmp_path, GPU)
    for folder in tmp_path.iterdir():
        config = read_config(folder)
        again = text_format.Parse(text_format.MessageToString(config), model_config_pb2.ModelConfig())
        assert again == config
        assert config.ByteSize() > 0
        assert json.loads((folder / "ditf.json").read_text())["bundle"] == "cat"


def _parsed(config):
    return text_format.Parse(pbtxt(config), model_config_pb2.ModelConfig())


def _tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
