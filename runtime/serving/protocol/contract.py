"""The models that a served bundle has: names, types and shapes of their tensors.

The one home of what clients are written against, here and on Triton, where a repository made from the bundle
has the same models: `features` is features.onnx or its engine itself; `match` and `correspond` take what a
client has at hand. A dimension of -1 is the client's choice.

Sizes are (height, width), points (x, y) in pixels of the image they are in, pixel centres at integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.bundles.manifest import Manifest

SERVED_FEATURES = "features"
SERVED_MATCH = "match"
SERVED_CORRESPOND = "correspond"
VERSION = "1"  # of every model: a bundle that changes is another bundle

METHOD = "method"
PROMPT = "prompt"
"""Request parameters of ditf serve beside tensors: how to match, and which of the bundle's conditions."""

Results = dict[str, np.ndarray]
"""A model's outputs by name."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model.

    Attributes:
        name: in requests and answers.
        datatype: as the protocol calls it: UINT8, INT64, FP16, FP32.
        shape: -1 for a dimension of any length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A model's tensors, in order, and the request parameters that it takes beside them."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...]


def model_specs(manifest: Manifest) -> dict[str, ModelSpec]:
    """The models of a bundle.

    `features`: image UINT8 [B, H, W, 3], RGB at the bundle's size -> features [B, C, h, w], FP16 or FP32 as
    exported. B is the bundle's batch, or anything where that is dynamic; ditf serve takes any B.

    `match`: source, target [C, h, w], features of one image each; source_size, target_size INT64 [2], of the
    original images; points FP32 [N, 2] in the source -> matches FP32 [N, 2] in the target, scores FP32 [N],
    cosines.

    `correspond`: source, target UINT8 [H, W, 3], RGB images of any size; points FP32 [N, 2] -> matches and
    scores as above.
    """
    height, width = manifest.size
    features = (manifest.channels, *manifest.grid)
    datatype = features_datatype(manifest)
    points = TensorSpec("points", "FP32", (-1, 2))
    found = (TensorSpec("matches", "FP32", (-1, 2)), TensorSpec("scores", "FP32", (-1,)))
    models = (
        ModelSpec(
            SERVED_FEATURES,
            (TensorSpec("image", "UINT8", (-1, height, width, 3)),),
            (TensorSpec("features", datatype, (-1, *features)),),
            (PROMPT,),
        ),
        ModelSpec(
            SERVED_MATCH,
            (
                TensorSpec("source", datatype, features),
                TensorSpec("target", datatype, features),
                TensorSpec("source_size", "INT64", (2,)),
                TensorSpec("target_size", "INT64", (2,)),
                points,
            ),
            found,
            (METHOD,),
        ),
        ModelSpec(
            SERVED_CORRESPOND,
            (
                TensorSpec("source", "UINT8", (-1, -1, 3)),
                TensorSpec("target", "UINT8", (-1, -1, 3)),
                points,
            ),
            found,
            (PROMPT, METHOD),
        ),
    )
    return {model.name: model for model in models}


def features_datatype(manifest: Manifest) -> str:
    """FP16 or FP32, the type of the bundle's features."""
    # Bundles that do not say are older than the choice: float16 went with the precision.
    dtype = manifest.features_dtype or ("float32" if manifest.precision == "float32" else "float16")
    if manifest.features_dtype is None and not manifest.adaln:
        dtype = "float32"
    return "FP16" if dtype == "float16" else "FP32"
