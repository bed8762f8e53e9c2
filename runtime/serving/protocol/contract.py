"""The models of a served bundle, with the names, types and shapes of their tensors.

Clients are written against these definitions, both for `ditf serve` and for Triton, where a repository that
is made from a bundle has the same models. `features` is features.onnx or its engine itself; `match` and
`correspond` take what a client has at hand. A dimension of -1 may have any length.

Sizes are (height, width). Points are (x, y) in pixels of the image that they are in, with pixel centres at
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.bundles.manifest import Manifest

SERVED_FEATURES = "features"
SERVED_MATCH = "match"
SERVED_CORRESPOND = "correspond"
VERSION = "1"  # of every model; a changed bundle is another bundle

METHOD = "method"
PROMPT = "prompt"
"""Request parameters beside the tensors: how to match, and which of the bundle's conditions to use."""

Results = dict[str, np.ndarray]
"""A model's outputs by name."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model.

    Attributes:
        name: its name in requests and answers.
        datatype: the protocol's name of its type: UINT8, INT64, FP16 or FP32.
        shape: its shape; -1 stands for a dimension of any length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A model's tensors in order, and the request parameters that it takes beside them."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...]


def model_specs(manifest: Manifest) -> dict[str, ModelSpec]:
    """The models of a bundle.

    `features` takes image UINT8 [B, H, W, 3], RGB at the bundle's size, and returns features [B, C, h, w],
    FP16 or FP32 as exported. B is the bundle's batch, or any number if that is dynamic; ditf serve takes
    any B.

    `match` takes source and target [C, h, w], the features of one image each; source_size and target_size
    INT64 [2], the sizes of the original images; and points FP32 [N, 2] in the source. It returns matches
    FP32 [N, 2] in the target and scores FP32 [N], their cosines.

    `correspond` takes source and target UINT8 [H, W, 3], RGB images of any size, and points FP32 [N, 2]. It
    returns matches and scores as `match` does.
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
    """The type of the bundle's features, FP16 or FP32."""
    # Older bundles do not state the type; in them it followed from the precision.
    dtype = manifest.features_dtype or ("float32" if manifest.precision == "float32" else "float16")
    if manifest.features_dtype is None and not manifest.adaln:
        dtype = "float32"
    return "FP16" if dtype == "float16" else "FP32"
