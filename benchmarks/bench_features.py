"""Feature time, size and accuracy of a bundle against what a user would write.

The peer is the unmodified diffusers pipeline's parts in PyTorch: AutoencoderKL encodes the image, the
scheduler adds noise, PixArtTransformer2DModel runs whole, and a forward hook on block k's attention
takes what it receives, which is the feature. Against it, one image at a time on one thread, in
processor time:

    hook, stopped   the same, but the hook raises, so that blocks k.. do not run
    bundle          ditf's features.onnx on ONNX Runtime, float32
    bundle --fp16   the same of a float16 bundle. ONNX Runtime's CPU kernels compute a float16 graph in
                    float32, so this is the cost of its casts, not the speed of float16

All sides start from the same uint8 image and end with features. End to end is timed as it is. Parts
are latents x_t in, features out, and what comes before. In PyTorch they are timed apart within each run;
a bundle's graph is cut in two at x_t, its own nodes and weights, and the halves are timed by themselves.

Weights are random: time and size do not depend on them, and the accuracy is the arithmetic's alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnx.utils
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from harness import (
    Bench,
    Rows,
    in_child,
    interleave,
    open_session,
    paired_ratio,
    say,
    summary,
    wait_until_idle,
    workplace,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ditf.calib.images import procedural_images
from ditf.calib.machine import peak_bytes
from ditf.calib.parity import feature_parity
from ditf.cli.check import golden_metrics
from ditf.cli.support.output import bytes_text
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.checkpoints.noise_schedule import draw_noise
from ditf.export.exporter import export_bundle
from ditf.export.families.pixart import PixArt
from ditf.export.planning.export_options import SHORT_NAMES, ExportOptions
from ditf.runtime import load
from ditf.runtime.bundles.bundle import FEATURES, FEATURES_DATA, GOLDEN

THREADS = 1
PROMPT = "a bird"  # 8 tokens of the tokenizer below; the other 112 of the 120 are masked
TIMESTEP = 261
SEED = 0
IMAGES = 4  # inputs are rotated


@dataclass(frozen=True)
class Geometry:
    """Sizes of a checkpoint, and the layer that is exported."""

    layer: int
    blocks: int
    heads: int
    head_dim: int
    sample_size: int
    caption_channels: int
    vae_channels: tuple[int, ...]

    @property
    def pixels(self) -> int:
        """Side of the image in pixels."""
        return self.sample_size * 2 ** (len(self.vae_channels) - 1)


GEOMETRIES = {
    "xl": Geometry(9, 28, 16, 72, 64, 4096, (128, 256, 512, 512)),  # PixArt-XL/2 at 512 px
    "small": Geometry(1, 2, 4, 16, 16, 64, (32, 32, 64, 64)),  # to try the script
}
BUNDLES = ("fp32", "fp16")
PARTS = ("VAE", "transformer")


def main() -> None:
    """Make the checkpoint, export, time, check, and write the result."""
    bench = Bench(__doc__, THREADS, repeats=5, keeps=True)
    arguments = bench.parse()
    name = "small" if bench.smoke else "xl"
    geometry = GEOMETRIES[name]
    with workplace(arguments.folder) as folder:
        exports = prepare(folder, geometry)
        wait_until_idle(arguments.wait)
        bench.start()
        say(f"timing, {arguments.repeats} rounds after a warm-up")
        timed = in_child(measure, folder, geometry, arguments.repeats)
        say("checking the bundles against their golden outputs")
        result = {
            "geometry": {"name": name, "pixels": geometry.pixels, **asdict(geometry)},
            **timed,
            "golden": in_child(check, folder),
            "bytes": sizes(folder),
            "export": exports,
        }
    bench.write(f"features-{name}", result, rows(result))


def prepare(folder: Path, geometry: Geometry) -> dict[str, Any]:
    """Write the checkpoint and export the bundles, unless they exist; returns the cost of each."""
    record = folder / "exports.json"
    if not record.exists():
        say("writing the checkpoint")
        in_child(write_checkpoint, folder / "checkpoint", geometry)
        exports = {}
        for bundle in BUNDLES:
            say(f"exporting {bundle}")
            exports[bundle] = in_child(export, folder / bundle, folder / "checkpoint", geometry.layer)
            in_child(split, folder / bundle)
        record.write_text(json.dumps(exports))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def write_checkpoint(folder: Path, geometry: Geometry) -> None:
    """Save a PixArt with random weights through its own pipeline; its T5 is a tiny one."""
    quieten_libraries()
    torch.manual_seed(SEED)
    width = geometry.heads * geometry.head_dim
    stages = len(geometry.vae_channels)
    pipeline = PixArtAlphaPipeline(
        tokenizer=spelling_tokenizer(),
        text_encoder=T5EncoderModel(
            T5Config(
                vocab_size=140, d_model=geometry.caption_channels, d_ff=64, num_layers=1, num_heads=4, d_kv=8
            )
        ),
        vae=AutoencoderKL(
            block_out_channels=geometry.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            layers_per_block=2,
            sample_size=geometry.pixels,
        ),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=geometry.heads,
            attention_head_dim=geometry.head_dim,
            num_layers=geometry.blocks,
            cross_attention_dim=width,
            caption_channels=geometry.caption_channels,
            sample_size=geometry.sample_size,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)


def spelling_tokenizer() -> T5Tokenizer:
    """Make a T5 tokenizer with one token for each letter."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=vocabulary + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"])


def export(bundle: Path, checkpoint: Path, layer: int) -> dict[str, Any]:
    """Export one bundle on all cores; returns its wall-clock seconds and the peak memory of the process."""
    quieten_libraries()
    start = time.perf_counter()
    options = ExportOptions(
        model=str(checkpoint),
        layer=str(layer),
        precision=SHORT_NAMES[bundle.name],
        timestep=(TIMESTEP,),
        prompt=(PROMPT,),
        seed=SEED,
        discard="none",
        output=bundle,
    )
    stages: list[tuple[float, str]] = []
    export_bundle(options, lambda stage: stages.append((time.perf_counter() - start, stage)))
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
        "stages": [f"{s:.1f} s: {stage.replace(str(checkpoint), checkpoint.name)}" for s, stage in stages],
    }


def split(bundle: Path) -> None:
    """Cut features.onnx at the input of the patch embedder: <bundle>-parts/VAE.onnx, transformer.onnx."""
    parts = parts_of(bundle)
    parts.mkdir()
    (parts / FEATURES_DATA).hardlink_to(bundle / FEATURES_DATA)
    cut(bundle / FEATURES, PARTS, parts)


def cut(features: Path, names: Sequence[str], folder: Path, *between: str) -> None:
    """Cut a features.onnx into <folder>/<name>.onnx, at x_t and at the values `between`."""
    model = onnx.load(features, load_external_data=False)
    x_t = next(node.input[0] for node in model.graph.node if "trunk.embedder.weight" in node.input)
    edges = ["image", x_t, *between, "features"]
    extractor = onnx.utils.Extractor(model)
    for name, source, made in zip(names, edges[:-1], edges[1:], strict=True):
        onnx.save(extractor.extract_model([source], [made]), folder / f"{name}.onnx")


def parts_of(bundle: Path) -> Path:
    """The folder that `split` writes."""
    return bundle.with_name(f"{bundle.name}-parts")


class Peer:
    """The feature as a user of diffusers would compute it."""

    class _Done(Exception):
        pass

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        checkpoint = Checkpoint(folder, str(folder))
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer").eval()
        self.scheduler = DDPMScheduler.from_config(checkpoint.config("scheduler"))
        side = geometry.sample_size
        self.noise = draw_noise(1, (4, side, side), SEED)
        self.grid = (side // 2, side // 2)
        family = PixArt(checkpoint.config("transformer"))
        (condition,) = family.encode_conditions(checkpoint, [PROMPT], None)
        self.text_tokens = family.text_tokens(condition)
        pixels = (geometry.pixels, geometry.pixels)
        self.inputs = family.reference_inputs(condition, TIMESTEP, pixels, self.grid, 1)
        self.stop = False
        self.seen = torch.empty(0)
        self.parts: list[tuple[float, float]] = []  # seconds of the VAE and of the transformer, each call
        self.transformer.transformer_blocks[geometry.layer].attn1.register_forward_pre_hook(self._hook)

    def _hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.seen = inputs[0]
        if self.stop:
            raise self._Done

    @torch.inference_mode()
    def features(self, image: np.ndarray, stop: bool) -> np.ndarray:
        """Features [C, h, w] of an image uint8 [H, W, 3]; `stop` leaves the model at block k."""
        self.stop = stop
        start = time.process_time()
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        x_0 = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
        encoded = time.process_time()
        x_t = self.scheduler.add_noise(x_0, self.noise, torch.tensor([TIMESTEP]))
        with contextlib.suppress(self._Done):
            self.transformer(x_t, **self.inputs)
        tokens = self.seen[0]
        self.parts.append((encoded - start, time.process_time() - encoded))
        return tokens.T.reshape(-1, *self.grid).numpy()


class Side:
    """A bundle on ONNX Runtime, whole and in its parts, one thread."""

    def __init__(self, bundle: Path) -> None:
        self._whole = open_session(bundle / FEATURES, THREADS)
        self._vae, self._trunk = (open_session(parts_of(bundle) / f"{part}.onnx", THREADS) for part in PARTS)
        self._x_t = np.empty(0)

    def features(self, image: np.ndarray) -> np.ndarray:
        """Features [C, h, w], end to end."""
        return self._whole.run(None, {"image": image[None]})[0][0]

    def latents(self, image: np.ndarray) -> None:
        """Run the VAE part."""
        self._x_t = self._vae.run(None, {"image": image[None]})[0]

    def features_of_latents(self, image: np.ndarray) -> np.ndarray:
        """Run the transformer part on what `latents` left; `image` is not used."""
        return self._trunk.run(None, {self._trunk.get_inputs()[0].name: self._x_t})[0][0]


def measure(folder: Path, geometry: Geometry, repeats: int) -> dict[str, Any]:
    """Time the peer and the bundles in turns, one thread each, in one process."""
    quieten_libraries()
    torch.set_num_threads(THREADS)
    images = procedural_images((geometry.pixels,) * 2, IMAGES)
    peer = Peer(folder / "checkpoint", geometry)
    runs: dict[str, Callable[[np.ndarray], Any]] = {
        "hook": lambda image: peer.features(image, stop=False),
        "stopped": lambda image: peer.features(image, stop=True),
    }
    for name in BUNDLES:
        side = Side(folder / name)
        runs |= {
            name: side.features,
            f"{name} VAE": side.latents,
            f"{name} transformer": side.features_of_latents,
        }
    answers = {name: run(images[0]) for name, run in runs.items()}
    answers = {name: answer for name, answer in answers.items() if answer is not None}
    peer.parts.clear()
    seconds, disturbance = interleave(runs, lambda name, number: runs[name](images[number % IMAGES]), repeats)
    parts = np.array(peer.parts).reshape(-1, 2, 2)[1:]  # round, side, part; without the untimed round
    for i, name in enumerate(("hook", "stopped")):
        seconds |= {f"{name} {part}": parts[:, i, j].tolist() for j, part in enumerate(PARTS)}
    return {
        "timing": disturbance,
        "text_tokens_unmasked": peer.text_tokens,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": _ratios(seconds),
        "same_image_as_hook": {n: _agreement(a, answers["hook"]) for n, a in answers.items() if n != "hook"},
    }


def _agreement(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    channels = len(expected)
    return feature_parity(actual.reshape(channels, -1).T, expected.reshape(channels, -1).T)


def _ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times faster than the whole transformer with a hook, end to end and by part."""
    ratios = {}
    for name in ("stopped", *BUNDLES):
        ratios[f"end to end: hook / {name}"] = paired_ratio(seconds["hook"], seconds[name])
        for part in PARTS:
            peer, side = seconds[f"hook {part}"], seconds[f"{name} {part}"]
            ratios[f"{part}: hook / {name}"] = paired_ratio(peer, side)
    return ratios


def check(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of `ditf check` for each bundle, and those of its rehearsal at export."""
    metrics = {}
    for name in BUNDLES:
        with load(folder / name, backend="onnxruntime") as model:
            metrics[name] = golden_metrics(model, model.bundle.read_arrays(GOLDEN))[0]
            metrics[f"{name} in PyTorch, rehearsed"] = model.manifest.rehearsal
    return metrics


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the checkpoint's weights and of each bundle, every file counted."""
    files = {part: (folder / "checkpoint" / part).rglob("*.safetensors") for part in ("transformer", "vae")}
    files |= {name: (folder / name).iterdir() for name in BUNDLES}
    return {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}


def rows(result: dict[str, Any]) -> Rows:
    """Make the table, with a row for each side."""
    labels = {
        "hook": f"diffusers {diffusers.__version__}, hook, whole transformer",
        "stopped": "diffusers, stopped at block k",
        "fp32": "ditf bundle, float32",
        "fp16": "ditf bundle --fp16 (computed in float32 by this CPU runtime)",
    }
    checkpoint = result["bytes"]["transformer"] + result["bytes"]["vae"]
    heading = ("", "end to end", "x", "VAE", "x", "transformer", "x")
    lines: Rows = [(*heading, "weights or bundle", "export peak", "cosine min, mean")]
    for name, label in labels.items():
        line = [label]
        for part in ("end to end", *PARTS):
            side = name if part == "end to end" else f"{name} {part}"
            ratio = result["ratios"].get(f"{part}: hook / {name}", {"median": 1.0})
            line += [f"{result['seconds'][side]['median']:.2f} s", f"{ratio['median']:.2f}"]
        line.append(bytes_text(result["bytes"].get(name, checkpoint)))
        if name in BUNDLES:
            golden = result["golden"][name]
            line.append(bytes_text(result["export"][name]["peak_bytes"]))
            line.append(f"{golden['cosine_min']:.8f}, {golden['cosine_mean']:.8f}")
        else:
            line += ["", "the reference"]
        lines.append(tuple(line))
    return lines


if __name__ == "__main__":
    main()
