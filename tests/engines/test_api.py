"""Every TensorRT name the code uses exists in each version it is for, or is asked for first.

api/ holds one file per Python binding, named after its package and version: those of the names below that
the binding has. A name that the code uses for the first time is therefore missing until the files are made
again, each in an environment where that version of the package is installed:

    python -m tests.engines.test_api tensorrt > tests/engines/api/tensorrt-11.4.0.106.txt

The first line of a file says of which package and version it is.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from ditf.runtime.backends.flavour import has

ROOT = Path(__file__).parent.parent.parent
LISTS = sorted((Path(__file__).parent / "api").glob("*.txt"))
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
    "runtime": "Runtime",
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


WRONG = [
    "trt.BuilderFlag.FP16",  # gone in 11
    "trt.BuilderFlag.STRIP_PLANS",
    "config.builder_optimisation_level = 3",
    "trt.ComputeCapability.SM89",  # TensorRT-RTX's alone
    "network.num_layer",
    "context.execute_async_v2(stream)",  # gone
    "self._engine.get_binding_name(0)",
    "self._trt.OnnxRefitter",
]


def found(package: str) -> list[str]:
    """Which of the names that the code uses or asks for, and of the wrong ones, an installed binding has."""
    binding = importlib.import_module(package)
    names = set().union(*(names for source in [*sources().values(), *WRONG] for names in used(source)))
    names |= {name.partition(".")[0] for name in names}
    return sorted(name for name in names if name.strip(".") and has(binding, name.rstrip(".")))


def listed(names: list[str]) -> dict[str, list[str]]:
    """Members by the class that has them."""
    api: dict[str, list[str]] = {}
    for name in names:
        owner, _, member = name.partition(".")
        api.setdefault(owner, []).extend([member] if member else [])
    return api


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
    engines = [path for path in (ROOT / "engines").glob("*.py") if not path.name.startswith("triton")]
    backends = [path for path in (ROOT / "runtime/backends").glob("*.py") if "trt: Any" in path.read_text()]
    return {path.name: path.read_text() for path in sorted([*engines, *backends])}


def apis() -> dict[str, dict[str, list[str]]]:
    """By binding: its names."""
    return {path.stem: listed(path.read_text().splitlines()[1:]) for path in LISTS}


def test_there_are_four_bindings():
    assert [path.stem.rpartition("-")[0] for path in LISTS] == ["tensorrt"] * 3 + ["tensorrt-rtx"]


@pytest.mark.parametrize("binding", apis())
def test_every_name_exists(binding):
    for name, source in sources().items():
        assert not missing(source, apis()[binding]), (binding, name)


def test_every_name_exists_in_the_installed_binding():
    for name, source in sources().items():
        assert not missing(source, listed(found("tensorrt_rtx"))), name


def test_names_are_found():
    names = set().union(*(used(source)[0] for source in sources().values()))
    assert {"Builder", "OnnxParser", "IBuilderConfig.set_flag", "BuilderFlag.STRIP_PLAN"} <= names
    assert {"INetworkDefinition.get_layer", "Builder.build_serialized_network"} <= names
    assert {"ICudaEngine.get_tensor_profile_shape", "IExecutionContext.execute_async_v3"} <= names
    assert {"Runtime.deserialize_cuda_engine", "OnnxParserRefitter.refit_from_file"} <= names
    assert {"OnnxParser.load_initializer", "OnnxParserRefitter.refit_model_proto"} <= names
    assert len(names) > 50


@pytest.mark.parametrize("line", WRONG)
def test_a_misspelt_or_missing_name_is_noticed(line):
    assert any(missing(line, api) for api in apis().values())
    assert not any(missing(f'has(trt, "BuilderFlag.FP16"); {line}', api) for api in apis().values()) or (
        "FP16" not in line
    )


if __name__ == "__main__":
    package = sys.argv[1]
    print(f"# The Python package {package} {importlib.import_module(package).__version__} has these names:")
    print(*found(package), sep="\n")
