"""Every TensorRT name the code uses exists in each version it is for, or is asked for first.

The public names of four real bindings lie beside the project; where they do not (a clone alone), only
the installed one is compared.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LISTS = sorted((ROOT.parent / "shared" / "tensorrt-api").glob("*.json"))
OBJECTS = {  # what a variable or attribute of this name is
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "optimization_profile": "IOptimizationProfile",
    "layer": "ILayer",
    "output": "ITensor",
    "learned": "ITimingCache",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "loader": "OnnxParserRefitter",
    "_config": "IRuntimeConfig",
    "_kernel_cache": "IRuntimeCache",
}
OWN = {
    "network.builder",
    "network.log",
    "network.layers",
    "network.network",
    "error.problem",
    "error.strerror",
    "error.filename",
}


def installed() -> dict[str, list[str]]:
    """The same list, of the installed TensorRT-RTX."""
    import tensorrt_rtx

    public = {name: getattr(tensorrt_rtx, name) for name in dir(tensorrt_rtx) if name[0].isupper()}
    return {name: [part for part in dir(value) if part[0] != "_"] for name, value in public.items()}


def used(source: str) -> tuple[set[str], set[str]]:
    """Names like "BuilderFlag.STRIP_PLAN" that code uses, and those it asks for with `has`."""
    tree = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = ast.unparse(node)
        parts = chain.split(".")
        if parts[:2] == ["self", "_trt"]:
            parts = parts[1:]
        if parts[0] in ("trt", "_trt") and all(part.isidentifier() for part in parts):
            names.add(".".join(parts[1:3]))
        owner = ast.unparse(node.value).rpartition(".")[2]
        if owner in OBJECTS and f"{owner}.{node.attr}" not in OWN:
            names.add(f"{OBJECTS[owner]}.{node.attr}")
    asked = set(re.findall(r"(?:has|_require)\((?:self\._)?trt, f?\"([\w.]+)", source))
    return {name for name in names if "__" not in name}, asked


def missing(source: str, api: dict[str, list[str]]) -> set[str]:
    names, asked = used(source)
    absent = set()
    for name in names:
        owner, _, member = name.partition(".")
        known = owner in api and (not member or member in api[owner])
        # Asking for a type is enough where it is missing as a whole.
        guarded = owner not in api and owner in asked
        guarded |= any(name == one or name == one.partition(".")[0] or one.startswith(name) for one in asked)
        if not known and not guarded:
            absent.add(name)
    return absent


def sources() -> dict[str, str]:
    runtime = ROOT / "runtime"
    engines = [path for path in (ROOT / "engines").glob("*.py") if not path.name.startswith("triton")]
    others = ("flavour.py", "graph_loading.py", "backends/engine_session.py")
    paths = [*engines, *(runtime / name for name in others)]
    return {path.name: path.read_text() for path in sorted(paths)}


def apis() -> list[tuple[str, dict[str, list[str]]]]:
    listed = [(path.stem, json.loads(path.read_text())) for path in LISTS]
    return [("installed", installed()), *listed]


@pytest.mark.parametrize(
    ("version", "api"), apis(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_name_exists(version, api):
    for name, source in sources().items():
        assert not missing(source, api), (version, name)


def test_names_are_found():
    names = set().union(*(used(source)[0] for source in sources().values()))
    assert {"Builder", "OnnxParser", "IBuilderConfig.set_flag", "BuilderFlag.STRIP_PLAN"} <= names
    assert {"INetworkDefinition.get_layer", "Builder.build_serialized_network"} <= names
    assert {"ICudaEngine.get_tensor_profile_shape", "IExecutionContext.execute_async_v3"} <= names
    assert {"Runtime.deserialize_cuda_engine", "OnnxParserRefitter.refit_from_file"} <= names
    assert {"OnnxParser.load_initializer", "OnnxParserRefitter.refit_model_proto"} <= names
    assert len(names) > 50


@pytest.mark.parametrize(
    "line",
    [
        "trt.BuilderFlag.FP16",  # gone in 11
        "trt.BuilderFlag.STRIP_PLANS",
        "config.builder_optimisation_level = 3",
        "trt.ComputeCapability.SM89",  # TensorRT-RTX's alone
        "network.num_layer",
        "context.execute_async_v2(stream)",  # gone
        "self._engine.get_binding_name(0)",
        "self._trt.OnnxRefitter",
    ],
)
def test_a_misspelt_or_missing_name_is_noticed(line):
    if not LISTS:
        pytest.skip("the lists of names are not beside this clone")
    assert any(missing(line, api) for _, api in apis())
    assert not any(missing(f'has(trt, "BuilderFlag.FP16"); {line}', api) for _, api in apis()) or (
        "FP16" not in line
    )
