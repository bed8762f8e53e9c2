"""The builder half: TensorRT-RTX's real builder and parser, which remember what a plan was built from."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

from tests.standin import registry
from tests.standin.engine import log, note_logger
from tests.standin.world import World


def building_classes(world: World, real: Any, module: Any, flavour: str) -> dict[str, Any]:
    """Builder, OnnxParser, Refitter and OnnxParserRefitter for a module.

    Args:
        real: the installed `tensorrt_rtx`, which parses in both flavours, and compiles in its own.
        module: the module that offers the classes.
        flavour: "tensorrt" or "tensorrt_rtx".
    """
    models: list[tuple[Any, bytes, dict[str, bytes]]] = []  # (network, model, weights)

    class OnnxParser(real.OnnxParser):  # type: ignore[misc]
        def __init__(self, network: Any, logger: Any) -> None:
            real.OnnxParser.__init__(self, network, logger)
            self._network = network
            self._weights: dict[str, bytes] = {}
            self._model = b""

        def load_model_proto(self, model: Any, path: Any = None) -> bool:
            self._model = bytes(model)
            return bool(real.OnnxParser.load_model_proto(self, model))

        def load_initializer(self, name: str, data: int, size: int) -> bool:
            self._weights[name] = ctypes.string_at(data, size)
            return bool(real.OnnxParser.load_initializer(self, name, data, size))

        def parse_model_proto(self) -> bool:
            models.append((self._network, self._model, self._weights))
            return bool(real.OnnxParser.parse_model_proto(self))

        def parse_from_file(self, path: str) -> bool:
            models.append((self._network, _inlined(Path(path)), {}))
            return bool(real.OnnxParser.parse_from_file(self, path))

    class Builder(real.Builder):  # type: ignore[misc]
        def __init__(self, logger: Any) -> None:
            real.Builder.__init__(self, logger)
            note_logger(world, logger)
            self._profiles: list[Any] = []

        def create_optimization_profile(self) -> Any:
            profile = real.Builder.create_optimization_profile(self)
            self._profiles.append(profile)
            return profile

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if world.refused("build_serialized_network"):
                log(world, module, "the build was made to fail")
                return None
            model, weights = next((m, w) for n, m, w in reversed(models) if n is network)
            model = registry.with_weights(model, weights)
            inputs = [network.get_input(i).name for i in range(network.num_inputs)]
            dynamic = [i for i in inputs if -1 in tuple(_tensor(network, i).shape)]
            profiles = [
                {name: [list(shape) for shape in profile.get_shape(name)] for name in dynamic}
                for profile in self._profiles
            ]
            flags = [
                name
                for name in dir(real.BuilderFlag)
                if name.isupper() and config.get_flag(getattr(real.BuilderFlag, name))
            ]
            if flavour == "tensorrt_rtx":
                plan = real.Builder.build_serialized_network(self, network, config)
                if plan is None:
                    return None
                target = "portable"
                if config.num_compute_capabilities:
                    target = _target(config.get_compute_capability(0))
                plan = bytes(plan)
            else:
                target = ""
                header = f"stand-in for a plan of {module.__name__} {module.__version__}; "
                text = header + repr((profiles, flags)) + hashlib.sha256(model).hexdigest()
                plan = text.encode().ljust(4096, b".")
            stored = registry.without_weights(model) if "STRIP_PLAN" in flags else model
            registry.record(plan, stored, registry.Built(profiles, target, flags, module.__version__))
            return plan

    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            self.engine = engine
            self.model = b""

        def refit_cuda_engine(self) -> bool:
            if world.refused("refit_cuda_engine") or not self.model:
                return False
            from tests.standin.graph_session import GraphSession

            self.engine.session = GraphSession(self.model)
            self.engine.refitted = True
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Any, logger: Any) -> None:
            self._refitter = refitter
            self._model = b""
            self._weights: dict[str, bytes] = {}

        def load_model_proto(self, model: Any, path: Any = None) -> bool:
            self._model = bytes(model)
            return True

        def load_initializer(self, name: str, data: int, size: int) -> bool:
            self._weights[name] = ctypes.string_at(data, size)
            return True

        def refit_model_proto(self) -> bool:
            self._refitter.model = registry.with_weights(self._model, self._weights)
            return registry.without_weights(self._refitter.model) == self._refitter.engine.model

        def refit_from_file(self, path: str) -> bool:
            self._refitter.model = _inlined(Path(path))
            return registry.without_weights(self._refitter.model) == self._refitter.engine.model

    classes = (OnnxParser, Builder, Refitter, OnnxParserRefitter)
    return {one.__name__: one for one in classes}


def _inlined(path: Path) -> bytes:
    import onnx

    return onnx.load(path).SerializeToString()


def _tensor(network: Any, name: str) -> Any:
    return next(t for t in (network.get_input(i) for i in range(network.num_inputs)) if t.name == name)


def _target(capability: Any) -> str:
    name = capability.name
    return name.lower().replace("sm", "sm_") if name.startswith("SM") else "portable"
