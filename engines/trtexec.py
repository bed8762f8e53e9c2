"""What NVIDIA's own command-line builder, trtexec, needs to build a bundle's graphs as `ditf build` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ditf.engines.build import features_profiles, match_profile
from ditf.engines.network import Profile
from ditf.runtime.bundles.bundle import FEATURES, MATCH, Bundle

_OPSET_OF_10 = 20
"""The newest opset that onnx-tensorrt's list of operators gives for TensorRT 10.0 and 10.1, the last lists
before JetPack 6's 10.3. The list of 10.15 says 24, and that of 11.5 says 25."""


def trtexec_lines(bundle: Bundle, batch: Sequence[tuple[int, int, int]] = ((1, 1, 1),)) -> list[str]:
    """One command for each graph, for trtexec of TensorRT 10.3 to 11.

    The types are the graph's own: version 11 accepts --stronglyTyped and needs it no more. float32 products
    are computed in float32, because TF32 moves matches by more than a pixel.

    Args:
        batch: smallest, usual and largest batch of each profile, for a bundle with a dynamic batch.
    """
    return [
        *(_line(bundle, FEATURES, profile) for profile in features_profiles(bundle, tuple(batch)) or [{}]),
        _line(bundle, MATCH, match_profile(bundle)),
    ]


def unread_opset(opset: int, version: str) -> str:
    """Say that a version of TensorRT may not read a graph; "" if it does.

    Args:
        version: of TensorRT, such as "10.3.0".
    """
    if opset <= _OPSET_OF_10 or not version.startswith("10."):
        return ""
    return (
        f"this bundle has ONNX opset {opset}, and TensorRT {version} may not read more than {_OPSET_OF_10};"
        f" if it refuses the graph, export with --opset {_OPSET_OF_10}"
    )


def _line(bundle: Bundle, graph: str, profile: Profile) -> str:
    plan = graph.replace(".onnx", ".plan")
    words = ["trtexec", f"--onnx={bundle.path / graph}", f"--saveEngine={plan}", "--stronglyTyped"]
    words += [] if bundle.may_round(graph) else ["--noTF32"]
    for index, which in enumerate(("min", "opt", "max") if profile else ()):
        shapes = (f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in profile.items())
        words.append(f"--{which}Shapes={','.join(shapes)}")
    return shlex.join([*words, "--skipInference"])
