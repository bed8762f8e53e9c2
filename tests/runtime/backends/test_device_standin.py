"""Which GPU and which backend run a bundle, on the stand-in for a GPU of tests/standin.

What is tested is the choice and what is said about it; nothing here ran on a real driver.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ditf import load
from ditf.runtime.backends import engine_records, load_backend, open_features
from ditf.runtime.backends.cuda import OutOfDeviceMemory, open_cuda
from ditf.runtime.backends.device import Device, find_device, parse_device
from ditf.runtime.backends.engine import EngineBackend
from ditf.runtime.backends.gpu import find_gpu, find_gpus
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, InputError, MissingComponent
from tests.standin.fixtures import installed
from tests.standin.world import DeviceModel, World

pytestmark = pytest.mark.usefixtures("standin_plans")

RTX = "tensorrt-rtx"
FULL = "10.3.0"
ADA = DeviceModel()
ORIN = DeviceModel("Orin", (8, 7), 8, integrated=True)
AGX_ORIN = DeviceModel("Orin", (8, 7), 16, integrated=True)
TURING = DeviceModel("Tesla T4", (7, 5), 40)
RUNNING = ("check", "bench", "match", "track", "features", "eval", "serve")


def test_gpus_standin():
    with installed(World([ORIN, AGX_ORIN], driver=12060)):
        assert [str(gpu) for gpu in find_gpus()] == ["Orin sm_87 8 SMs", "Orin sm_87 16 SMs"]
        assert find_gpu(1) == find_gpus()[1]
        assert find_gpu(1).integrated
        assert find_gpu(2) is None


@pytest.mark.parametrize(("text", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cpu", None)])
def test_a_device_standin(text, index):
    with installed(World([ADA, TURING])):
        assert find_device(text) == Device(index)


@pytest.mark.parametrize(
    "text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1,2", "cuda:¹", "1", "cuda:1 "]
)
def test_what_is_no_device_standin(text):
    with installed(World([ADA, TURING])), pytest.raises(InputError) as caught:
        parse_device(text)
    assert caught.value.exit_code == 2
    assert caught.value.fix == (
        "choose cpu or cuda:0 (NVIDIA Stand-in sm_89 24 SMs) or cuda:1 (Tesla T4 sm_75 40 SMs)"
    )


@pytest.mark.parametrize("backend", ["auto", RTX, "onnxruntime"])
def test_a_device_that_is_not_there_standin(standin_bundle, backend):
    with installed(World([ADA])), pytest.raises(MissingComponent, match="there is no cuda:1 here") as caught:
        load(standin_bundle, backend, device="cuda:1")
    assert caught.value.exit_code == 3
    assert "cuda:0 (NVIDIA Stand-in sm_89 24 SMs)" in caught.value.fix


def test_a_device_without_a_driver(demo_bundle):
    with installed(World([])), pytest.raises(MissingComponent) as caught:
        load(demo_bundle, device="cuda")
    assert caught.value.fix == "choose cpu: no NVIDIA driver answers"


def test_auto_runs_the_engine_standin(standin, standin_bundle):
    with load(standin_bundle) as model:
        assert model.backend == RTX
        assert "NVIDIA Stand-in sm_89 24 SMs" in model.detail


def test_auto_goes_on_when_the_plan_is_refused_standin(standin, standin_bundle):
    standin.fail("deserialize_cuda_engine", times=2)
    with load(standin_bundle) as model:
        assert model.backend == "onnxruntime"
        assert f"not {RTX}: tensorrt_rtx refuses " in model.reason
        assert "deserialisation was made to fail" in model.reason
    with pytest.raises(BundleError, match="tensorrt_rtx refuses"):
        load(standin_bundle, RTX)
    assert not standin.alive()
    with load(standin_bundle) as model:
        assert model.backend == RTX


def test_auto_goes_on_when_the_plan_was_altered_standin(standin, standin_bundle, tmp_path):
    copy = shutil.copytree(standin_bundle, tmp_path / "bundle")
    plan = next(copy.glob("engines/*/features.plan"))
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with load(copy) as model:
        assert model.backend == "onnxruntime"
        assert "features.plan" in model.reason


def test_auto_ends_when_memory_is_short_standin(standin_bundle):
    """Whoever asked for a GPU's speed is told; a CPU would be a hundred times slower."""
    with installed(World([DeviceModel(total_bytes=1 << 20)])) as world:
        with pytest.raises(OutOfDeviceMemory):
            load(standin_bundle)
        assert not world.alive()


@pytest.mark.parametrize(
    ("models", "why"),
    [
        ([ORIN], "TensorRT-RTX has no target for Orin sm_87 8 SMs"),
        ([TURING], "was built for sm_89, this GPU is Tesla T4 sm_75 40 SMs"),
    ],
)
def test_auto_goes_on_where_no_engine_fits_standin(standin_bundle, models, why):
    with installed(World(models)), load(standin_bundle) as model:
        assert model.backend == "onnxruntime"
        assert why in model.reason


@pytest.mark.parametrize(
    ("model", "command"), [(ORIN, "tensorrt"), (TURING, "tensorrt-rtx --target sm_75"), (ADA, RTX)]
)
def test_a_named_backend_says_what_to_build_standin(demo_bundle, model, command):
    with installed(World([model])), pytest.raises(BundleError) as caught:
        load(demo_bundle, RTX)
    assert caught.value.fix == f"run: ditf build {demo_bundle} --backend {command}"


def test_the_second_gpu_runs_everything_standin(standin_bundle):
    with installed(World([TURING, ADA])) as world:
        image = np.zeros((48, 64, 3), np.uint8)
        with load(standin_bundle, device="cuda:1") as model:
            assert model.backend == RTX
            source = model.features(image)
            model.match(source, source, [[5, 5]])
            assert world.memory.used[1]
            assert not world.memory.used[0]
            del source  # its features are in the GPU's memory
        assert not world.alive()
        assert not world.faults


def test_the_cpu_is_onnx_runtimes_standin(standin, standin_bundle):
    with load(standin_bundle, device="cpu") as model:
        assert model.backend == "onnxruntime"
        assert "tensorrt-rtx needs a GPU" in model.reason
        assert "CPUExecutionProvider" in model.detail
    with pytest.raises(InputError, match="tensorrt-rtx does not run on the CPU"):
        load(standin_bundle, RTX, device="cpu")


def test_onnx_runtime_takes_no_gpu_that_it_cannot_use_standin(standin, demo_bundle):
    """The installed ONNX Runtime has no CUDA."""
    with pytest.raises(MissingComponent, match="does not run on CUDA: it was built without") as caught:
        load(demo_bundle, "onnxruntime", device="cuda")
    assert "--device cpu" in caught.value.fix


def test_onnx_runtime_is_told_the_device(monkeypatch, standin, demo_bundle):
    import onnxruntime

    given = []
    real = onnxruntime.InferenceSession

    def session(model, options, providers, provider_options, **others):
        given.append(dict(zip(providers, provider_options, strict=True)))
        return real(model, options, providers=["CPUExecutionProvider"], **others)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(MissingComponent, match="its libraries did not load"):
        load_backend("onnxruntime", Device(1)).open_session(Bundle.open(demo_bundle), "match.onnx")
    load_backend("onnxruntime", Device(None)).open_session(Bundle.open(demo_bundle), "match.onnx")
    assert given[0]["CUDAExecutionProvider"]["device_id"] == "1"
    assert given[1] == {"CPUExecutionProvider": {}}


def test_engine_json_is_read_once_a_session_standin(standin, standin_bundle, monkeypatch):
    reads = []
    real = engine_records.record_content
    monkeypatch.setattr(engine_records, "record_content", lambda folder: reads.append(folder) or real(folder))
    open_features(Bundle.open(standin_bundle)).features.close()
    assert len(reads) == 1


def test_rtx_is_not_for_a_jetson_standin():
    with installed(World([ORIN])):
        probe = EngineBackend(RTX).probe()
    assert not probe.available
    assert probe.detail == "TensorRT-RTX has no target for Orin sm_87 8 SMs"
    assert "rtx" not in probe.fix.lower()


def test_every_verb_that_runs_a_model_has_the_option(ditf):
    for verb in RUNNING:
        assert "--device" in ditf(verb, "--help").stdout, verb
        done = ditf(verb, "--device", "tpu", *("absent",) * 3)
        assert done.returncode == 2
        assert "device 'tpu' is not cpu, cuda or cuda:N; choose cpu" in done.stderr


def test_the_option_standin(ditf, standin_bundle, tmp_path):
    image = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (64, 48)).save(image)
    with installed(World([TURING, ADA])):
        done = ditf(
            "features", standin_bundle, image, "-o", "f.npz", "--device", "cuda:1", "--json", "f.json"
        )
        assert done.returncode == 0, done.stderr
        assert "tensorrt-rtx 1.7.1.116, NVIDIA Stand-in sm_89 24 SMs" in done.stderr
        done = ditf("features", standin_bundle, image, "-o", "f.npz", "--device", "cuda:2")
        assert done.returncode == 3
        assert "there is no cuda:2 here; choose cpu or cuda:0 (Tesla T4" in done.stderr
        done = ditf("features", standin_bundle, image, "-o", "store", "--engine", "ray", "--device", "cuda:1")
        assert done.returncode == 2
        assert "Ray gives each actor its GPU" in done.stderr


@pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")
def test_full_tensorrt_builds_for_the_device_standin(ditf, demo_bundle, tmp_path):
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    build = ("build", copy, "--backend", "tensorrt")
    with installed(World([ORIN, AGX_ORIN], driver=12060), FULL) as world:
        done = ditf(*build)
        assert done.returncode == 0, done.stderr
        done = ditf(*build, "--device", "cuda:1")
        assert done.returncode == 0, done.stderr
        assert world.device == 1  # TensorRT builds on the thread's current device
        records = [json.loads(path.read_text()) for path in sorted(copy.glob("engines/*/engine.json"))]
        assert [one["gpu"] for one in records] == ["Orin sm_87 16 SMs", "Orin sm_87 8 SMs"]
        assert [one["key"].rpartition("-b1-")[0] for one in records] == [
            "tensorrt-10.3.0-orin-sm-87-16-sms",
            "tensorrt-10.3.0-orin-sm-87-8-sms",
        ]
        for index, name in enumerate(("8-sms", "16-sms")):
            with load(copy, "tensorrt", device=f"cuda:{index}") as model:
                assert name in model.detail
        assert "--device means nothing" in ditf("build", copy, "--backend", RTX, "--device", "cuda").stderr
        assert ditf(*build, "--device", "cpu").returncode == 2
        assert ditf(*build, "--device", "cuda:7").returncode == 3


def test_the_doctor_on_a_jetson_standin(ditf, demo_bundle, tmp_path):
    with installed(World([ORIN], driver=12060), FULL):
        done = ditf("doctor", demo_bundle, "--json", "d.json")
    assert done.returncode == 0, done.stderr
    assert "cuda:0: Orin sm_87 8 SMs, driver for CUDA 12.6, memory shared with the CPU" in done.stdout
    assert "10.3 with JetPack 6 on other Orins" in done.stdout
    assert "tensorrt: opens" in done.stdout
    assert "pip install 'ditf[tensorrt-rtx]'" not in done.stdout
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["gpus"][0]["multiprocessors"] == 8
    assert report["trtexec"] == [line.strip() for line in done.stdout.splitlines() if "trtexec -" in line]


def test_bindings_newer_than_a_jetsons_driver_standin():
    """JetPack 6: the bindings that its driver takes are in cuda-python; cuda-bindings begins with 12.8."""
    with installed(World([ORIN], driver=12060)) as world:
        world.fail("cudaGetDeviceCount", "cudaErrorInsufficientDriver")
        with pytest.raises(
            MissingComponent, match=r"runs CUDA up to 12\.6, cuda-python is for a newer"
        ) as caught:
            open_cuda(0)
    assert caught.value.exit_code == 3
    assert caught.value.fix == (
        "run: pip uninstall -y cuda-bindings cuda-python && pip install 'cuda-python<=12.6.99'"
    )


@pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")
def test_build_warns_of_an_opset_that_tensorrt_10_may_not_read_standin(ditf, demo_bundle, tmp_path):
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "opset": 22}))
    with installed(World([ORIN]), FULL):
        done = ditf("build", copy, "--backend", "tensorrt")
    assert done.returncode == 0, done.stderr
    assert "warning: this bundle has ONNX opset 22, and TensorRT 10.3.0 may not read" in done.stderr
