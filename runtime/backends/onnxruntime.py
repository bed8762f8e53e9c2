"""The ONNX Runtime backend: it runs on CUDA if that provider loads, else on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditf.runtime.backends import Probe
from ditf.runtime.backends.device import Device
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.onnx_graph import ITEM_BYTES, Graph
from ditf.runtime.errors import BundleError, MissingComponent

logger = logging.getLogger(__name__)

_INSTALL = "run: pip install 'ditf[onnxruntime]' (or 'ditf[onnxruntime-gpu]' for CUDA, never both)"
_WANTED = _CUDA_PROVIDER, _CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
_CPU = Path("/proc/cpuinfo")


class OnnxRuntimeBackend:
    """ONNX Runtime; see `ditf.runtime.backends.Backend`.

    Args:
        device: None for CUDA's first GPU if that provider loads, and the CPU otherwise.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._device = device

    def probe(self) -> Probe:
        """Find out whether ONNX Runtime imports, and which providers it was built with."""
        try:
            import onnxruntime
        except ImportError as error:
            return Probe(False, f"onnxruntime does not import ({error})", _INSTALL)
        providers = [p for p in _WANTED if p in onnxruntime.get_available_providers()]
        return Probe(True, f"onnxruntime {onnxruntime.__version__}, {', '.join(providers)}")

    def prepared(self, bundle: Bundle) -> bool:
        """Every bundle is prepared: ONNX Runtime runs the bundle's own graphs."""
        return True

    def open_session(self, bundle: Bundle, graph: str) -> OnnxRuntimeSession:
        """Open a graph and its weights from the bytes that were verified.

        Raises:
            MissingComponent: ONNX Runtime does not import, or has no CUDA for the device.
            BundleError: ONNX Runtime refuses the graph.
        """
        return OnnxRuntimeSession(bundle.read_graph(graph), bundle.may_round(graph), self._device)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime; see `ditf.runtime.backends.Session`.

    Args:
        tf32: float32 products may round their factors to TF32 on a GPU.
    """

    batches = ()
    device_seconds = device_bytes = None

    def __init__(self, graph: Graph, tf32: bool = False, device: Device | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingComponent(f"onnxruntime does not import ({error})", _INSTALL) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only; what matters is raised as an exception
        # Threads that spin between runs would take cores from the matcher, and power from a robot.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Otherwise bytes that look like ONNX Runtime's own format are read as such, and that can name files.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        quantised = b"DequantizeLinear" in graph.model
        dequantised = quantised and saturates(_CPU)
        if dequantised:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        weights = _initializers(onnxruntime, graph)
        options.add_external_initializers(list(weights), list(weights.values()))
        available = onnxruntime.get_available_providers()
        wanted = [provider for provider in _WANTED if provider in available]
        gpu = None if device is None else device.index
        if device is not None and gpu is None:
            wanted = [_CPU_PROVIDER]
        elif gpu is not None and _CUDA_PROVIDER not in wanted:
            raise _no_cuda(onnxruntime, "it was built without CUDA")
        # By default the CUDA provider rounds the factors of float32 products to 10 mantissa bits.
        cuda = {"use_tf32": str(int(tf32)), "device_id": str(gpu or 0)}
        settings = [cuda if name == _CUDA_PROVIDER else {} for name in wanted]
        # It would make a quantised graph's products float ones.
        disabled = ["MatMulAddFusion"] if quantised else []
        try:
            session = onnxruntime.InferenceSession(
                graph.model,
                options,
                providers=wanted,
                provider_options=settings,
                disabled_optimizers=disabled,
            )
        except Exception as error:  # its exceptions share no base class
            if "NOT_IMPLEMENTED" in str(error):  # bfloat16 on a CPU
                raise MissingComponent(
                    f"ONNX Runtime {onnxruntime.__version__} has no kernel on {', '.join(wanted)} for"
                    f" {graph.path} ({_first_line(error)})",
                    "run it where there is a GPU, or export with --precision fp16",
                ) from error
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} refuses {graph.path} ({_first_line(error)})",
                "export the bundle again with the installed versions",
            ) from error
        used = session.get_providers()
        # ONNX Runtime only logs when a provider fails to load.
        lost = "".join(f" ({p} did not load)" for p in wanted if p not in used)
        if gpu is not None and lost:
            raise _no_cuda(onnxruntime, "its libraries did not load")
        if lost:
            logger.warning("onnxruntime runs on %s%s", used[0], lost)
        self.detail = f"onnxruntime {onnxruntime.__version__}, {used[0]}{lost}" + (
            f", device {gpu}" if gpu else ""
        )
        if dequantised:
            self.detail += ", int8 products in float32 because the CPU has no VNNI"
        self.inputs = {item.name: _known(item.shape) for item in session.get_inputs()}
        self.outputs = {item.name: _known(item.shape) for item in session.get_outputs()}
        self._session = session
        self._path = graph.path

    def run(self, feeds: Mapping[str, np.ndarray], keep: Collection[str] = ()) -> dict[str, np.ndarray]:
        """Run the graph. All arrays are in host memory; `keep` has no effect."""
        if self._session is None:
            raise RuntimeError("the session is closed")
        try:
            values = self._session.run(list(self.outputs), dict(feeds))
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # its exceptions share no base class
            raise BundleError(
                f"ONNX Runtime cannot run {self._path} ({_first_line(error)})", "export the bundle again"
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        """Free the session and its memory."""
        self._session = None


def _initializers(onnxruntime: Any, graph: Graph) -> dict[str, Any]:
    """The weights by name, as ONNX Runtime takes them. It copies them when it makes the session.

    Raises:
        BundleError: the elements of a type do not have a whole number of bytes.
    """
    values = {}
    for name, (tensor, content) in graph.tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise BundleError(
                f"{graph.path}: {name} has the ONNX type {tensor.dtype}, which cannot be handed over",
                "export the bundle again with fp16, fp32 or int8",
            )
        # Unsigned integers stand in for all types, because NumPy has no bfloat16.
        array = np.frombuffer(content, f"u{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.dtype)
    return values


def _no_cuda(onnxruntime: Any, why: str) -> MissingComponent:
    return MissingComponent(
        f"onnxruntime {onnxruntime.__version__} does not run on CUDA: {why}",
        "use --device cpu, or run: pip uninstall onnxruntime, then pip install 'ditf[onnxruntime-gpu]'",
    )


def _known(shape: list[int | str | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)


def saturates(cpu: Path) -> bool:
    """Whether int8 products would be wrong on this CPU.

    Without VNNI, ONNX Runtime multiplies int8 on x86-64 with an instruction that adds two products in 16 bits
    and saturates. Its own remedy, session.x64quantprecision, fails where weights share a zero point (1.31).

    Args:
        cpu: a file like /proc/cpuinfo.
    """
    try:
        fields = (line.partition(":") for line in cpu.read_text().splitlines())
    except OSError:
        return False
    flags = next((value.split() for key, _, value in fields if key.strip() == "flags"), [])
    return "avx2" in flags and not any(flag.endswith("vnni") for flag in flags)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]
