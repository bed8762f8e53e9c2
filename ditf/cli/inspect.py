"""`ditf inspect`: show what is in a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ditf.cli.support.bundles import open_bundle, pca_text, vae_text
from ditf.cli.support.options import SIGNATURE, BundleArgument, JsonOption, verb
from ditf.cli.support.output import bytes_text, show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.runtime.backends.engine_records import RECORD, engine_folders, record_content
from ditf.runtime.bundles.bundle import CONDITIONS
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.bundles.signing import Trust
from ditf.runtime.errors import BundleError


@verb(SIGNATURE)
def inspect(
    bundle: BundleArgument,
    json_file: JsonOption = None,
) -> None:
    """Show what a bundle computes, and the size and type of its parts."""
    check_writable(json_file, inputs=(bundle,))
    opened = open_bundle(bundle)
    manifest = opened.manifest
    opened.verify(manifest.files)
    show(table(_summary(manifest)))
    if opened.trust.signers is not None:
        show(f"signed      by a key in {opened.trust.signers}")
    show("\nfiles (all hashes as in the manifest)")
    show(table([("  " + name, bytes_text(file["bytes"])) for name, file in manifest.files.items()]))
    if manifest.conditioning != "bake":
        show("\ninputs beside the image, of each condition")
        arrays = opened.read_arrays(CONDITIONS)
        show(
            table(
                [
                    ("  " + name.partition(".")[2], str(array.dtype), "x".join(map(str, array.shape)))
                    for name, array in arrays.items()
                    if name.startswith("0.")
                ]
            )
        )
    engines = engine_folders(opened.path)
    if engines:
        show("\nengines")
        show(table([("  " + folder.name, _trusted(folder, opened.trust)) for folder in engines]))
    show("\nparameters")
    rows: list[tuple[str, ...]] = []
    for part, by_type in manifest.parts.items():
        for dtype, count in by_type.items():
            rows.append(("  " + part, dtype, f"{count['parameters']:,}", bytes_text(count["bytes"])))
    totals = [count for by_type in manifest.parts.values() for count in by_type.values()]
    total = sum(count["parameters"] for count in totals)
    rows.append(("  total", "", f"{total:,}", bytes_text(sum(count["bytes"] for count in totals))))
    show(table(rows))
    if manifest.removed:
        show("\nleft out of the checkpoint, as stored there")
        show(
            table(
                [
                    ("  " + step, f"{count['parameters']:,}", bytes_text(count["bytes"]))
                    for step, count in manifest.removed.items()
                ]
            )
        )
    gates = manifest.recipe.get("gates")
    if isinstance(gates, dict):
        show(
            f"\ngates: {gates.get('folded')} folded into weights, {gates.get('explicit')} explicit in float32"
        )
    kept = manifest.recipe["float32"]
    show("\nfloat32 in the graph")
    show(table([("  " + name, reason) for name, reason in kept.items()]))
    exceptions = manifest.recipe.get("exceptions")
    if exceptions:
        show("\nexceptions that the calibration asked for")
        show(table([("  " + e["where"], e["is"], e["why"]) for e in exceptions]))
    write_json(json_file, {"bundle": str(bundle), "manifest": asdict(manifest)})


def _trusted(folder: Path, trust: Trust) -> str:
    """Whether an engine is signed; "" if no signature is required."""
    if trust.signers is None:
        return ""
    try:
        trust.check(folder / RECORD, record_content(folder))
    except BundleError as error:
        return f"not signed: {error.problem}"
    return "signed"


def _summary(manifest: Manifest) -> list[tuple[str, ...]]:
    height, width = manifest.size
    h, w = manifest.grid
    dtype = "" if manifest.features_dtype is None else f" {manifest.features_dtype}"
    discard = ",".join(map(str, manifest.discard["channels"])) or "none"
    return [
        ("model", f"{manifest.model['id']} ({manifest.model['family']})"),
        *([] if manifest.vae is None else [("encoder", vae_text(manifest.vae))]),
        *(("LoRA", f"{lora['file']}, {lora['scale']:g} times") for lora in manifest.lora),
        ("layer", manifest.layer_name),
        ("input", f"image uint8 [{_batch(manifest)}, {height}, {width}, 3]"),
        ("output", f"features{dtype} [{_batch(manifest)}, {manifest.channels}, {h}, {w}]"),
        *([] if manifest.pca is None else [("PCA", pca_text(manifest.channels, manifest.pca))]),
        ("precision", manifest.precision),
        (
            "discarded",
            f"channels {discard} ({manifest.discard['source']}, {manifest.discard['stage']} the norm)",
        ),
        ("AdaLN", "yes" if manifest.adaln else "no: plain hidden states"),
        ("conditioning", _conditioning(manifest)),
        ("timestep", _timesteps(manifest)),
        ("noise", f"{manifest.noise}, ensemble of {manifest.ensemble}, seed {manifest.seed}"),
        ("condition", _condition(manifest)),
        *([] if manifest.guidance is None else [("guidance", f"{manifest.guidance:g}")]),
        *([] if manifest.text_tokens is None else [("text", f"cut to {manifest.text_tokens} T5 tokens")]),
        *([] if manifest.text_padding is None else [("text padding", manifest.text_padding)]),
        *([] if not manifest.golden else [("golden", _golden(manifest))]),
        ("opset", str(manifest.opset)),
        ("made by", manifest.command.replace("\n", "\\n")),
        ("with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _golden(manifest: Manifest) -> str:
    """What made the golden outputs."""
    golden = manifest.golden
    if golden.get("oracle") == "independent":
        return f"by {golden['transformer']}, independent of the exporter"
    return f"by the streamed transformer{': ' + golden['reason'] if 'reason' in golden else ''}"


def _batch(manifest: Manifest) -> str:
    return "B" if manifest.batch == "dynamic" else str(manifest.batch)


def _timesteps(manifest: Manifest) -> str:
    several = sorted({entry["timestep"] for entry in manifest.conditions})
    return ", ".join(map(str, several or [manifest.timestep]))


def _conditioning(manifest: Manifest) -> str:
    return {
        "bake": "bake: the condition is constant",
        "bank": "bank: the condition is chosen by name",
        "live": "live: embeddings and timestep are inputs",
    }[manifest.conditioning]


def _condition(manifest: Manifest) -> str:
    if manifest.conditioning != "bake":
        names = [repr(entry["name"]) for entry in manifest.conditions]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more
    if manifest.prompt is not None:
        return f"prompt {manifest.prompt!r}"
    return "null class" if manifest.class_label is None else f"class {manifest.class_label}"
