"""Memory of an export against the depth of the checkpoint, at FLUX.1's real width.

A random bf16 checkpoint of the real diffusers class, 3072 channels, in shards, with FLUX.1's own VAE layout;
embeddings are given, so no text encoder is needed. It is cut at its last block, so that all the others are
exported. Every depth is an export of its own process, watched from outside: the peak is the kernel's (VmHWM),
what is not pages of files (RssAnon) and the bytes from and to the disk are sampled.

    python benchmarks/bench_export_memory.py --depths 1+2 2+4 4+8 8+16
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from harness import RESULTS, ROOT, Bench, Rows, say
from PIL import Image
from safetensors.torch import save_file

from ditf.calib.images import procedural_images
from ditf.cli.support.output import bytes_text
from ditf.export.checkpoints.loading import full_config, model_shapes

NAME = "export-memory"
CLASS = "FluxTransformer2DModel"
TEXT_TOKENS = 16
SIZE = "128x128"  # few tokens: time and memory are those of the weights
SHARD = 2 << 30
POOL = 1 << 26  # random numbers that all tensors are cut from; larger than the largest
THREADS = 1
INTERVAL = 0.02  # seconds from sample to sample
PICTURE = ROOT / "docs" / "export-memory.png"
CONFIG: dict[str, Any] = {"_class_name": CLASS, "guidance_embeds": True}  # FLUX.1's, by the class's defaults
VAE_CHANNELS = (128, 256, 512, 512)  # FLUX.1's
SMALL_VAE_CHANNELS = (32, 32, 32, 32)
SMALL = {  # to try the script
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
}


def write_checkpoint(folder: Path, config: dict[str, Any], vae_channels: tuple[int, ...]) -> int:
    """Write a random checkpoint in diffusers' layout; returns the bytes of its transformer."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(config))
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(shard, transformer / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, shape in model_shapes(CLASS, config).items():
        count, start = math.prod(shape), 7919 * len(shard)
        values = pool[start : start + count].reshape(shape)
        values = 10 + values if name.endswith(("norm_q.weight", "norm_k.weight")) else values
        shard[name] = (values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)).to(torch.bfloat16)
        total += 2 * values.numel()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (transformer / f"part-{index}").rename(transformer / file)
        weight_map.update(dict.fromkeys(names, file))
    index_file = transformer / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(torch.bfloat16).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return total


def write_embeddings(path: Path, config: dict[str, Any]) -> None:
    """Write random embeddings as `--prompt-embeds` reads them."""
    widths = full_config(CLASS, config)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, TEXT_TOKENS, widths["joint_attention_dim"], generator=generator)
    pooled = torch.randn(1, widths["pooled_projection_dim"], generator=generator)
    save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, path, metadata={"prompt": "random"})


def watch(command: list[str]) -> dict[str, Any]:
    """Run an export; returns its peaks in bytes, in all and by stage, and its seconds."""
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    stage = ["start"]
    said: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            if line.startswith("[") and " of " not in line.partition("]")[2][:16]:
                stage[0] = line.partition("] ")[2].partition(" /")[0].strip()  # without places

    listener = threading.Thread(target=listen)
    listener.start()
    peaks = {"rss": 0, "anonymous": 0, "read": 0, "written": 0}
    by_stage: dict[str, dict[str, float]] = {}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            moved = Path(f"/proc/{process.pid}/io").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            break
        found = {
            line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith(" kB")
        }
        disk = {line.split(":")[0]: int(line.split()[1]) for line in moved.splitlines()}
        if "VmHWM" in found:
            now = {"rss": found["VmRSS"] << 10, "anonymous": found["RssAnon"] << 10}
            peaks["rss"] = max(peaks["rss"], found["VmHWM"] << 10)
            peaks["anonymous"] = max(peaks["anonymous"], now["anonymous"])
            peaks["read"], peaks["written"] = disk["read_bytes"], disk["write_bytes"]
            entry = by_stage.setdefault(
                stage[0], {"rss": 0, "anonymous": 0, "from": time.monotonic() - started}
            )
            entry["rss"] = max(entry["rss"], now["rss"])
            entry["anonymous"] = max(entry["anonymous"], now["anonymous"])
        time.sleep(INTERVAL)
    code = process.wait()
    listener.join()
    assert process.stderr is not None
    process.stderr.close()
    if code:
        raise RuntimeError("\n".join(said[-5:]))
    return {**peaks, "seconds": time.monotonic() - started, "stages": by_stage}


def export_command(checkpoint: Path, embeds: Path, layer: int, output: Path, *more: str) -> list[str]:
    """The command line of the measured export."""
    command = [sys.executable, "-m", "ditf", "export", "--model", str(checkpoint), "--layer", str(layer)]
    command += ["--fp16", "--size", SIZE, "--prompt-embeds", str(embeds), "--output", str(output)]
    return [*command, *more]


def measure(
    depth: str, folder: Path, config: dict[str, Any], vae_channels: tuple[int, ...]
) -> dict[str, Any]:
    """Export a checkpoint of `depth` blocks, such as "2+4"."""
    doubles, singles = map(int, depth.split("+"))
    config = {**config, "num_layers": doubles, "num_single_layers": singles}
    checkpoint, embeds, pictures = folder / "checkpoint", folder / "embeds.safetensors", folder / "pictures"
    pictures.mkdir()
    Image.fromarray(procedural_images((128, 128))[0]).save(pictures / "one.png")
    say(f"{depth}: writing a checkpoint")
    stored = write_checkpoint(checkpoint, config, vae_channels)
    write_embeddings(embeds, config)
    say(f"{depth}: {bytes_text(stored)}; exporting")
    layer = doubles + singles - 1
    more = ("--calibration-images", str(pictures))  # one: a pass more of the model shows nothing new
    result = watch(export_command(checkpoint, embeds, layer, folder / "bundle", *more))
    bundle = sum(path.stat().st_size for path in (folder / "bundle").iterdir())
    result = {"depth": depth, "layer": layer, "checkpoint": stored, "bundle": bundle, **result}
    shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "bundle")
    say(f"{depth}: peak {bytes_text(result['rss'])}, {result['seconds']:.0f} s")
    return result


def largest_block(config: dict[str, Any]) -> int:
    """Bytes of a two-stream block in float32."""
    shapes = model_shapes(CLASS, {**config, "num_layers": 1, "num_single_layers": 0})
    return sum(
        4 * torch.Size(shape).numel() for name, shape in shapes.items() if "transformer_blocks." in name
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the peaks against the size of the checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = result["runs"]
    sizes = [run["checkpoint"] / 1e9 for run in runs]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, key, style in (("peak resident", "rss", "o-"), ("of it anonymous", "anonymous", "s--")):
        axes.plot(sizes, [run[key] / 1e9 for run in runs], style, label=name)
    axes.axhline(
        result["bound"] / 1e9, color="gray", linestyle=":", label="3 GB + the largest block (float32)"
    )
    for before in result.get("before", []):
        axes.plot(
            before["checkpoint"] / 1e9, before["rss"] / 1e9, "x", color="C3", label="before: all in memory"
        )
    axes.plot(sizes, sizes, color="lightgray", label="the checkpoint itself (bf16)")
    for run, size in zip(runs, sizes, strict=True):
        axes.annotate(run["depth"], (size, run["rss"] / 1e9), (0, 7), textcoords="offset points", ha="center")
    axes.set(
        xlabel="transformer on disk, GB (blocks: two-stream + single)",
        ylabel="GB",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.set_title("ditf export --fp16 at FLUX.1's width")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every depth, one after another."""
    bench = Bench(__doc__, THREADS)
    bench.parser.add_argument("--depths", nargs="+", default=["1+2", "2+4", "4+8"], metavar="DOUBLES+SINGLES")
    bench.parser.add_argument(
        "--folder", type=Path, help="on a disk with room for twice the largest; temporary by default"
    )
    bench.parser.add_argument("--append", action="store_true", help="keep what was measured of other depths")
    bench.parser.add_argument(
        "--before", type=Path, help="JSON of runs of earlier code, to draw beside these"
    )
    arguments = bench.parse(depths=["1+1"], append=False)
    config = {**CONFIG, **(SMALL if bench.smoke else {})}
    vae_channels = SMALL_VAE_CHANNELS if bench.smoke else VAE_CHANNELS
    bench.start()
    runs: list[dict[str, Any]] = []
    if arguments.append and (RESULTS / f"{NAME}.json").exists():
        runs = json.loads((RESULTS / f"{NAME}.json").read_text())["runs"]
    for depth in arguments.depths:
        with tempfile.TemporaryDirectory(prefix="bench-export-", dir=arguments.folder) as folder:
            run = measure(depth, Path(folder), config, vae_channels)
        runs = sorted(
            [*(one for one in runs if one["depth"] != depth), run], key=lambda one: one["checkpoint"]
        )
        write(bench, runs, arguments.before, largest_block(config))


def write(bench: Bench, runs: list[dict[str, Any]], before: Path | None, block: int) -> None:
    """Write the result, the table of the docs and the picture."""
    result: dict[str, Any] = {"size": SIZE, "largest_block": block, "bound": 3 * 10**9 + block, "runs": runs}
    if before is not None:
        result["before"] = json.loads(before.read_text())
    rows: Rows = [
        ("blocks", "checkpoint", "bundle", "peak resident", "of it anonymous", "read", "written", "seconds")
    ]
    for run in runs:
        sizes = (run[key] for key in ("checkpoint", "bundle", "rss", "anonymous", "read", "written"))
        rows.append((run["depth"], *map(bytes_text, sizes), f"{run['seconds']:.0f}"))
    bench.write(NAME, result, rows, {("large.md", "memory"): rows})
    if not bench.smoke:
        draw(result, PICTURE)


if __name__ == "__main__":
    main()
