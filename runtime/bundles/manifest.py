"""manifest.json, which describes a bundle: the schema, and reading it with the standard library alone.

The exporter writes the manifest from the same class and reads it back before it releases a bundle.
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from ditf.runtime.errors import BundleError
from ditf.runtime.files.reading import read_regular

SCHEMA = 1
DYNAMIC_EXAMPLE = 2
"""The batch at which a graph with a dynamic batch is traced; torch.export would specialise a batch of 1."""
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 16 << 20
"""The most bytes that a manifest may have; usual ones have a few tens of thousands."""


HIDDEN_STATES = "hidden_states."


def hidden_states_name(block: int) -> str:
    """The name of the value in features.onnx that enters a block."""
    return f"{HIDDEN_STATES}{block}"


@dataclass(frozen=True)
class Manifest:
    """Everything that a device needs to know about a bundle.

    Attributes:
        schema: the version of this layout.
        model: the id, revision and family of the checkpoint, and `transformer`, its diffusers class.
        layer: the global index k of the block whose input is the feature.
        layer_name: the same for people, such as "layer 9 = block.9 of 12".
        timestep: the diffusion timestep, 0..999.
        prompt, class_label: the condition, or the first of several; None if the family has no such thing.
        seed, ensemble, noise: the noise of x_t: `ensemble` draws, which are "baked" or a graph "input".
        size: the size (H, W) of the graph's input in pixels.
        grid: the size (h, w) of the features in cells.
        channels: the channels C of the features, after --pca if it was given.
        batch: the static batch size, or "dynamic".
        adaln: False if the features are the plain hidden states (--no-adaln).
        discard: the discarded "channels" (ascending), the "stage" ("before" or "after" the norm) and their
            "source".
        precision: "float32", "float16", "bfloat16" or "int8".
        recipe: which tensors have which type, and the exceptions that a calibration asked for.
        parts: where the parameters are, {part: {dtype: {"parameters": n, "bytes": n}}}.
        opset: the opset of the ONNX graphs.
        conditioning: with "bake", prompt and timestep are constants of the graph. With "bank", rows computed
            from them are its inputs. With "live", embeddings and timestep are its inputs.
        tolerances: the gates of `ditf check`, {metric: limit}.
        rehearsal: the feature parity at export of the graph in PyTorch, in its own precision.
        measured: the feature parity at export of the written files, by backend: {"onnxruntime-cpu": {metric:
            value}} if ONNX Runtime was installed and had enough memory. None in bundles from before it.
        golden: the numbers of points and rows in golden.npz, and the images that they come from.
        versions: the versions of the tools that made the bundle.
        command: the command line that made it.
        files: {name: {"bytes": n, "sha256": hex}} of every other file outside engines/.
        conditions: the name, prompt or class label, and timestep of each condition that can be chosen.
        guidance: the guidance, for guidance-distilled models.
        text_tokens: the number of T5 tokens that were kept, if --text-tokens cut some that matter.
        features_dtype: the type of the output; None in bundles from before this field.
        pca: a projection: "of", the channels before it; what it keeps and costs, measured at export
            (`ditf.calib.projection`); and the images and tokens that it was learned from.
        vae: an encoder in place of the checkpoint's own (--vae): its id, revision and class, and under "x_0"
            how well it agrees with the checkpoint's (`ditf.calib.latents`).
        removed: what the export left out of the checkpoint, {step: {"parameters": n, "bytes": n}}.
    """

    schema: int
    model: dict[str, Optional[str]]
    layer: int
    layer_name: str
    timestep: int
    prompt: Optional[str]
    class_label: Optional[int]
    seed: int
    ensemble: int
    noise: Literal["baked", "input"]
    size: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    batch: Union[int, Literal["dynamic"]]
    adaln: bool
    discard: dict[str, Any]
    precision: Literal["float16", "float32", "bfloat16", "int8"]
    recipe: dict[str, Any]
    parts: dict[str, dict[str, dict[str, int]]]
    opset: int
    conditioning: Literal["bake", "bank", "live"]
    tolerances: dict[str, float]
    rehearsal: dict[str, float]
    golden: dict[str, Any]
    versions: dict[str, str]
    command: str
    files: dict[str, dict[str, Any]]
    conditions: list[dict[str, Any]] = field(default_factory=list)
    guidance: Optional[float] = None
    text_tokens: Optional[int] = None
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    features_dtype: Optional[Literal["float16", "float32"]] = None
    pca: Optional[dict[str, Any]] = None
    vae: Optional[dict[str, Any]] = None
    measured: Optional[dict[str, dict[str, float]]] = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest; see `manifest_content` and `parse_manifest`."""
    return parse_manifest(bundle, manifest_content(bundle))


def manifest_content(bundle: Path) -> bytes:
    """Read the bytes of a bundle's manifest.

    Raises:
        BundleError: there is no manifest, or it cannot be read.
    """
    path = bundle / MANIFEST
    try:
        return read_regular(path, LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{bundle} is not a bundle: it has no {MANIFEST}", "make one with ditf-export"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})", "export the bundle again") from error


def parse_manifest(bundle: Path, content: bytes) -> Manifest:
    """Validate the content of a bundle's manifest.

    Args:
        bundle: the directory, for messages.

    Raises:
        BundleError: the content is not JSON, has a newer schema, or lacks fields or has mistyped ones.
    """
    path = bundle / MANIFEST
    try:
        document = json.loads(content, parse_int=_number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error})", "export the bundle again") from error
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise BundleError(f"{path} is not a ditf manifest", "export the bundle again")
    if document["schema"] > SCHEMA:
        raise BundleError(
            f"{bundle} has schema {document['schema']}, this ditf reads up to {SCHEMA}",
            "run: pip install --upgrade ditf",
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is invalid ({error})", "export the bundle again") from error


def _parse(document: dict[str, Any]) -> Manifest:
    """Build the manifest, checking every field against its annotation. Unknown fields are ignored."""
    values: dict[str, Any] = {}
    optional = {
        item.name
        for item in fields(Manifest)
        if item.default is not MISSING or item.default_factory is not MISSING
    }
    for name, hint in get_type_hints(Manifest).items():
        if name not in document:
            if name in optional:
                continue
            raise KeyError(f"no field {name!r}")
        value = document[name]
        if not conforms(value, hint):
            raise TypeError(f"{name} is {value!r:.60}")
        values[name] = tuple(value) if get_origin(hint) is tuple else value
    manifest = Manifest(**values)
    _check_values(manifest)
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raise ValueError for values that no export writes and on which the runtime would fail."""
    for name in ("size", "grid", "channels", "batch", "ensemble"):
        value = getattr(manifest, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number != "dynamic" and number < 1 for number in numbers):
            raise ValueError(f"{name} is {value!r}")
    if not all(isinstance(manifest.model.get(key), str) for key in ("id", "family")):
        raise ValueError(f"model is {manifest.model!r:.60}")
    channels = manifest.discard.get("channels")
    numbered = isinstance(channels, list) and all(type(one) is int and one >= 0 for one in channels)
    if not (numbered and all(isinstance(manifest.discard.get(key), str) for key in ("stage", "source"))):
        raise ValueError(f"discard is {manifest.discard!r:.60}")
    recipe: dict[str, Any] = {
        "float32": dict[str, str],
        "exceptions": list[dict[str, str]],
        "float32_products": list[str],
    }
    for key, hint in recipe.items():
        if (key in manifest.recipe or key == "float32") and not conforms(manifest.recipe.get(key), hint):
            raise ValueError(f"recipe has {key} {manifest.recipe.get(key)!r:.60}")
    for exception in manifest.recipe.get("exceptions", []):
        if not {"where", "is", "why"} <= exception.keys():
            raise ValueError(f"recipe has an exception {exception!r:.60}")
    golden = manifest.golden.get("conditions", [])
    indices = range(max(1, len(manifest.conditions)))
    if not conforms(golden, list[int]) or not set(golden) <= set(indices):
        raise ValueError(f"golden has conditions {golden!r:.60}")
    if manifest.pca is not None:
        known = ("of", "energy_held_out", "matches_within_1px")
        if not all(conforms(manifest.pca.get(name), float) for name in known):
            raise ValueError(f"pca is {manifest.pca!r:.60}")
    if manifest.vae is not None:
        vae = manifest.vae
        named = all(conforms(vae.get(key), str) for key in ("id", "class"))
        named = named and conforms(vae.get("revision"), Optional[str])
        measured = ("relative_error", "correlation_min")
        x_0 = vae.get("x_0")
        if not (named and isinstance(x_0, dict) and all(conforms(x_0.get(key), float) for key in measured)):
            raise ValueError(f"vae is {vae!r:.60}")
    for part, by_type in {**manifest.parts, "removed": manifest.removed}.items():
        if not all({"parameters", "bytes"} <= entry.keys() for entry in by_type.values()):
            raise ValueError(f"{part!r} is {by_type!r:.60}")
    for condition in manifest.conditions:
        if not (conforms(condition.get("name"), str) and conforms(condition.get("timestep"), int)):
            raise ValueError(f"conditions hold {condition!r:.60}")
    if manifest.conditioning != "bake" and not manifest.conditions:
        raise ValueError("conditions are missing")
    for name, entry in manifest.files.items():
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"files names {name!r:.60}, which is no file of a bundle")
        if not (conforms(entry.get("bytes"), int) and conforms(entry.get("sha256"), str)):
            raise ValueError(f"files[{name!r}] is {entry!r:.60}")


def _number(text: str) -> int:
    if len(text) > 19:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def conforms(value: Any, hint: Any) -> bool:
    """Whether a JSON value has an annotated type. A tuple corresponds to a JSON list of its length."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin is Union:
        return any(conforms(value, argument) for argument in arguments)
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(arguments) and all(map(conforms, value, arguments))
        )
    if origin is list:
        return isinstance(value, list) and all(conforms(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(v, arguments[1]) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def tool_versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
