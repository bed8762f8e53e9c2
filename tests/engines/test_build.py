"""`ditf build` on a machine with no GPU: real TensorRT-RTX engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ditf.engines.build import build, engine_key
from ditf.engines.compile import BuildOptions, compile_plan
from ditf.engines.network import LayerType, Network, audit
from ditf.engines.pruning import prune
from ditf.runtime.backends.engine_records import engine_folders, read_record, verify_plans
from ditf.runtime.backends.flavour import FLAVOURS, TARGETS, choose_flavour, has, load_flavour
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, GateFailed, InputError, MissingComponent
from ditf.runtime.files.liveness import STALE, file_system_time
from tests.processes import started

RTX = FLAVOURS["tensorrt-rtx"]


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def built(built_bundle):
    """The demo bundle with an engine for sm_89, and what building it gave. Read-only."""
    bundle = Bundle.open(built_bundle)
    return bundle, make(bundle)


@pytest.fixture
def built_copy(built_bundle, tmp_path):
    return Bundle.open(shutil.copytree(built_bundle, tmp_path / "bundle"))


_compiled = {}


@pytest.fixture
def compiled_once(monkeypatch):
    """For tests of when an engine is built: the demo bundle is compiled once for all of them."""

    def once(trt, graph, options, *rest):
        key = (graph.path.name, options)
        if key not in _compiled:
            _compiled[key] = compile_plan(trt, graph, options, *rest)
        return _compiled[key]

    monkeypatch.setattr("ditf.engines.build.compile_plan", once)


def make(bundle, target="sm_89", **changes):
    return build(bundle, RTX, load_flavour("tensorrt-rtx"), BuildOptions(target), **changes)


def test_the_record_says_what_the_engine_is(built):
    bundle, made = built
    record = read_record(made.folder)
    assert record == made.record
    assert (record.target, record.gpu, record.driver) == ("sm_89", None, None)
    assert (record.batch, record.batch_text) == ([[1, 1, 1]], "1")
    assert record.onnx["features.onnx"] == bundle.manifest.files["features.onnx"]["sha256"]
    assert set(record.plans) == {"features.plan", "match.plan"} == set(record.seconds)
    assert record.stale(bundle) == ""
    assert made.folder.name == record.key


def test_the_second_time_there_is_nothing_to_do(built):
    bundle, made = built
    before = (made.folder / "features.plan").stat().st_mtime_ns
    again = make(bundle)
    assert again.reused
    assert (again.folder / "features.plan").stat().st_mtime_ns == before


def test_building_again_gives_the_same_bytes(copy, built):
    """Of the features. TensorRT-RTX lists the independent casts of match.onnx in an order that changes."""
    again, before = make(copy, force=True).record.plans, built[1].record.plans
    assert again["features.plan"] == before["features.plan"]
    assert again["match.plan"]["bytes"] == before["match.plan"]["bytes"]


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("target", [*TARGETS, "portable"])
def test_every_target(copy, target):
    made = make(copy, target)
    record = made.record
    assert read_record(made.folder) == record
    assert record.target == target
    assert record.plans["features.plan"]["bytes"] > 1_000_000
    # TensorRT-RTX has no float32 GEMM for Turing: match.plan is left out, with its reason.
    assert ("match.plan" in record.plans) == (target != "sm_75")
    assert bool(record.left_out) == (target == "sm_75")


def test_a_float32_bundle_for_turing_is_refused_with_its_reason(demo_bundle_float32, tmp_path):
    bundle = Bundle.open(shutil.copytree(demo_bundle_float32, tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r"no float32 products for sm_75.*--precision fp16"):
        make(bundle, "sm_75")
    assert not (bundle.path / "engines").exists() or not list((bundle.path / "engines").iterdir())


@pytest.mark.parametrize(
    ("fixture", "batch"),
    [
        ("pixart_bundle", [(1, 4, 8)]),
        ("pixart_bundle", [(1,), (2, 4, 8)]),
        ("bank_bundle", [(2,)]),
        ("live_bundle", []),
        ("int8_bundle", []),
    ],
)
def test_other_bundles(request, tmp_path, fixture, batch):
    bundle = Bundle.open(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "bundle"))
    record = make(bundle, batch=batch).record
    assert record.batch == [[one[0], one[len(one) // 2], one[-1]] for one in batch or [(1,)]]


def test_two_batches_get_a_profile_each(pixart_bundle, tmp_path):
    bundle = Bundle.open(shutil.copytree(pixart_bundle, tmp_path / "bundle"))
    said = []
    assert make(bundle, batch=[(1, 4)], report=said.append).record.batch == [[1, 1, 1], [4, 4, 4]]
    assert not any("--batch 1,8" in line for line in said)
    assert make(bundle, batch=[(1, 2, 4)], report=said.append).record.batch == [[1, 2, 4]]
    assert any("--batch 1,8" in line for line in said)


@pytest.mark.parametrize("batch", [(4, 1), (1, 1), (0,), (0, 2), (1, 2, 3, 4)])
def test_batches_that_are_none(pixart_bundle, batch):
    with pytest.raises(InputError, match="neither one size, nor two sizes"):
        make(Bundle.open(pixart_bundle), batch=[batch])


def test_a_batch_for_a_static_bundle(built):
    with pytest.raises(InputError, match=r"batch is 1.*--batch dynamic"):
        make(built[0], batch=[(1, 4, 8)])


def test_an_unknown_target(built):
    with pytest.raises(InputError, match="unknown target 'sm_1'"):
        make(built[0], "sm_1")


def test_the_key_changes_with_everything_that_matters(built):
    bundle, _ = built
    options = BuildOptions("sm_89")

    def key(**changes):
        given = {"version": "1.7", "target": "sm_89", "gpu": "", "batch": ((1, 1, 1),), "options": options}
        return engine_key(bundle, RTX, **{**given, **changes})

    others = [
        key(version="1.8"),
        key(target="sm_80"),
        key(batch=((1, 4, 8),)),
        key(batch=((1, 1, 1), (4, 4, 4))),
        key(options=replace(options, level=5)),
        key(options=replace(options, strip_weights=True)),
        key(gpu="Orin"),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key()


@pytest.mark.usefixtures("compiled_once")
def test_damaged_engines_are_noticed_and_built_again(built_copy):
    made = make(built_copy)
    plan = made.folder / "features.plan"
    content = plan.read_bytes()
    for damage, message in (
        (content[:-1], "truncated"),
        (content[:-1] + b"x", "has changed: its sha256 is another"),
        (content + b"x", "longer"),
    ):
        plan.write_bytes(damage)
        with pytest.raises(BundleError, match=message):
            verify_plans(made.folder, made.record)
    assert not make(built_copy).reused
    shutil.copy(made.folder / "match.plan", plan)  # another's plan
    assert not make(built_copy).reused
    assert plan.read_bytes() == content


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_record(built_copy, content):
    made = make(built_copy)
    (made.folder / "engine.json").write_text(content)
    with pytest.raises(BundleError):
        read_record(made.folder)
    assert not make(built_copy).reused


def test_types_that_are_not_the_bundles_fail_before_building(built):
    bundle, _ = built
    network = Network(load_flavour("tensorrt-rtx"), bundle.read_graph("features.onnx"))
    layers = list(network.layers)
    audit(layers, "float16", [])
    product = next(i for i, one in enumerate(layers) if one.kind == "MATRIX_MULTIPLY")
    residual = next(i for i, one in enumerate(layers) if one.value == "hidden_states.3")
    for index, dtype in ((product, "FLOAT"), (residual, "HALF")):
        changed = [*layers]
        changed[index] = replace(layers[index], dtype=dtype)
        with pytest.raises(GateFailed, match=f"computes {layers[index].name} in {dtype}"):
            audit(changed, "float16", [])
        audit(changed, "float32", [])
    audit([replace(layers[product], dtype="FLOAT")], "float16", [layers[product].name])
    with pytest.raises(GateFailed, match="quantises nothing"):
        audit([LayerType("trunk.x", "SOFTMAX", "x", "HALF")], "int8", [])


def test_a_float32_graph_in_a_float16_bundle_is_refused(copy, demo_bundle_float32):
    """Signed for: only the network tells."""
    for name in ("features.onnx", "features.onnx.data"):
        shutil.copy(demo_bundle_float32 / name, copy.path / name)
    theirs = json.loads((demo_bundle_float32 / "manifest.json").read_text())["files"]
    document = json.loads((copy.path / "manifest.json").read_text())
    document["files"].update({n: theirs[n] for n in ("features.onnx", "features.onnx.data")})
    (copy.path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(GateFailed, match="in FLOAT, and float16 means HALF"):
        make(Bundle.open(copy.path))


def test_full_tensorrt_is_not_here():
    with pytest.raises(MissingComponent, match=r"tensorrt is not installed; on Jetson it comes with JetPack"):
        load_flavour("tensorrt")
    with pytest.raises(InputError, match="builds no engines"):
        load_flavour("onnxruntime")
    assert choose_flavour("auto")[0] is RTX


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            "half installed .*libnvinfer",
        ),
        ("", "half installed .*no Builder"),
    ],
)
def test_a_half_installed_tensorrt(tmp_path, monkeypatch, code, message):
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingComponent, match=message):
        load_flavour("tensorrt")
    sys.modules.pop("tensorrt", None)


def test_what_a_version_lacks_is_asked_for():
    trt = load_flavour("tensorrt-rtx")
    assert has(trt, "BuilderFlag.STRIP_PLAN")
    assert not has(trt, "BuilderFlag.FP16")
    assert not has(trt, "NoSuchClass.NAME")


@pytest.mark.usefixtures("compiled_once")
def test_the_command_line(ditf, copy, tmp_path):
    done = ditf("build", "bundle", "--target", "sm_80,portable", "--json", "build.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built in") == 2
    report = json.loads((tmp_path / "build.json").read_text())
    assert [one["reused"] for one in report["engines"]] == [False, False]
    assert ditf("build", "bundle", "--target", "sm_80").stdout.rstrip().endswith("was there")
    listed = ditf("engines", "list", "bundle")
    assert listed.stdout.count("fits the bundle") == 2
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["files"]["match.onnx"]["sha256"] = "0" * 64
    (copy.path / "manifest.json").write_text(json.dumps(manifest))
    assert "built from another match.onnx" in ditf("engines", "list", "bundle").stdout
    pruned = ditf("engines", "prune", "bundle")
    assert pruned.stdout.count("removed") == 2
    assert "has no engines" in ditf("engines", "list", "bundle").stdout
    assert "nothing to remove" in ditf("engines", "prune", "bundle").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "tensorrt"], 3, "tensorrt is not installed"),
        (["--backend", "onnxruntime"], 2, "builds no engines"),
        (["--target", "sm_1"], 2, "unknown target"),
        (["--batch", "one"], 2, "is not numbers"),
        (["--workspace", "much"], 2, "is not a number of bytes"),
        (["--level", "9"], 2, "level"),
        (["--strip-weights"], 2, "has no --strip-weights"),
        (["--version-compatible"], 2, "has no --version-compatible"),
    ],
)
def test_errors_are_one_line(ditf, copy, arguments, code, message):
    done = ditf("build", "bundle", *arguments, "--quiet")
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_running_an_engine_says_what_it_needs(ditf, built):
    done = ditf("check", built[0].path, "--backend", "tensorrt-rtx", "--quiet")
    assert done.returncode == 3
    assert "no NVIDIA driver answers" in done.stderr


def test_export_and_build_in_one_go(ditf, tmp_path):
    done = ditf(
        "export", "--layer", "2", "--fp16", "--size", "64x64", "-o", "b", "--build", "--target", "sm_89"
    )
    assert done.returncode == 0, done.stderr
    assert "features.plan" in done.stdout
    assert ditf("export", "--target", "sm_89").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4])
def test_an_interrupted_build_leaves_nothing(copy, number, delay):
    """TensorRT drops what a signal's handler raises inside its callbacks."""
    command = [sys.executable, "-m", "ditf", "build", str(copy.path), "--target", "sm_89,sm_86"]
    with started(command) as process:
        for line in process.stderr:
            if "features.plan for" in line:
                break
        time.sleep(delay)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number, rest
    assert rest.splitlines()[-1].endswith("nothing was left half-written")
    assert "Traceback" not in rest
    assert all((path / "engine.json").is_file() for path in (copy.path / "engines").iterdir())


def test_what_a_killed_build_left_is_pruned(copy):
    engines = copy.path / "engines"
    left = engines / f".tensorrt-rtx-1-sm_89-b1-0.partial-{'0' * 8}-{'1' * 32}"
    left.mkdir(parents=True)
    assert prune(copy, engine_folders(copy.path)) == []  # its build may be alive, on another machine
    os.utime(left, ns=(file_system_time(engines) - 2 * STALE,) * 2)
    assert prune(copy, engine_folders(copy.path)) == [(left, "left by a build that was killed")]


def test_what_is_not_an_engine_alone_is_not_pruned(copy, tmp_path):
    """Engines' names, but a note in one, and links; and another name: none of it is ours to remove."""
    engines = copy.path / "engines"
    name = "tensorrt-10.3.0-orin-b1-0123456"
    (engines / f"{name}7").mkdir(parents=True)
    (engines / f"{name}7" / "notes.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (engines / f"{name}8").symlink_to(tmp_path / "elsewhere")
    (engines / f"{name}9").mkdir()
    (engines / f"{name}9" / "features.plan").symlink_to(copy.path / "features.onnx")
    (engines / "tensorrt-notes").mkdir()
    (engines / f"{name}a").mkdir()
    (engines / f"{name}a" / "features.plan").write_text("truncated")
    removed = prune(copy, engine_folders(copy.path))
    assert [(path.name, why) for path, why in removed] == [
        (f"{name}a", f"{engines / name}a has no engine.json")
    ]
    left = sorted(path.name for path in engines.iterdir())
    assert left == [f"{name}7", f"{name}8", f"{name}9", "tensorrt-notes"]


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"plans": {}}, "plans"),
        ({"plans": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "plans"),
        ({"flavour": "tensorrt"}, "version"),
        ({"flavour": "onnxruntime"}, "flavour"),
        ({"key": "../../x"}, "key"),
        ({"target": "sm_1"}, "target"),
        ({"gpu": "1\x1b[31m"}, "text"),
        ({"gpu": "\ud800"}, "text"),
        ({"batch": []}, "batch"),
        ({"batch": [[1, 1]]}, "batch"),
        ({"batch": [[3, 2, 1]]}, "batch"),
    ],
)
def test_a_record_that_contradicts_itself(built_copy, change, field):
    made = make(built_copy)
    path = made.folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=f"no valid {field}"):
        read_record(made.folder)
    assert not make(built_copy).reused


def test_a_record_of_a_newer_ditf_is_left_alone(built_copy):
    made = make(built_copy)
    path = made.folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(BundleError, match="pip install --upgrade"):
        make(built_copy)
    assert prune(built_copy, engine_folders(built_copy.path)) == []


def test_a_record_that_is_no_file(built_copy):
    made = make(built_copy)
    path = made.folder / "engine.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="not a regular file"):
        read_record(made.folder)


@pytest.mark.parametrize("target", ["sm_89,", "", "sm_999", "sm_89,sm_1"])
def test_targets_are_read_before_anything_is_built(ditf, copy, target):
    done = ditf("build", copy.path, "--target", target)
    assert done.returncode == 2
    assert "unknown target" in done.stderr
    assert not (copy.path / "engines").exists()


def test_list_sees_a_truncated_plan(ditf, built_copy):
    made = make(built_copy)
    (made.folder / "match.plan").write_bytes(b"")
    assert "match.plan is truncated" in ditf("engines", "list", built_copy.path).stdout


def test_a_full_disk_leaves_nothing(copy):
    """A limit on file size fails a write as a full disk does."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        " from ditf.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "build", str(copy.path), "--target", "sm_89", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "File too large" in done.stderr
    assert not list((copy.path / "engines").iterdir())


def test_two_builds_at_once(copy):
    command = [sys.executable, "-m", "ditf", "build", str(copy.path), "--target", "sm_89", "-q"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert make(copy).reused


@pytest.mark.parametrize("options", [["--workspace", "2GB"], ["--level", "0"]])
def test_options_of_the_builder(ditf, built_copy, options):
    assert ditf("build", "bundle", "--target", "sm_89").returncode == 0
    done = ditf("build", "bundle", "--target", "sm_89", *options)
    assert done.returncode == 0, done.stderr
    assert "built in" in done.stdout  # another engine
