"""What TensorRT-RTX makes of graphs of ditf and of plain diffusers modules: kernels, copies, bytes, memory.

Published widths with random weights and few blocks, float16, batch 1, the VAE left out. The plain graph is
torch.onnx's of the unmodified diffusers class with all weights in float16, cut at the same feature. Nothing
is run: the figures are from the builder's detailed log, which needs no GPU and depends on no machine.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from harness import ROOT, Bench, Rows, in_child, say, workplace
from torch import nn

from ditf.cli.support.output import bytes_text
from ditf.engines.compile import BuildOptions, compile_plan
from ditf.engines.report.kinds import ATTENTION, COPY, SYNC, kind_of
from ditf.engines.report.layer_log import read_layers
from ditf.engines.report.summary import Report
from ditf.export.checkpoints.loading import full_config, quieten_libraries
from ditf.export.estimate.published_configs import CONFIGS
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.export_options import DEFAULT_OPSET
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.onnx_graph import Graph

sys.path.insert(0, str(ROOT))
from tests.engines.trunks import TRUNKS, write_trunk

THREADS = 1
SIDE = 512  # of the image, px
TARGETS = ("sm_86", "sm_89", "sm_120")
CASES = {
    "PixArt-XL/2 512": ("2", {"num_layers": 3}, 20),
    "SD3.5 medium": ("2", {"num_layers": 3, "dual_attention_layers": [0, 1, 2]}, 333),
    "FLUX.1-dev": ("single.2", {"num_layers": 2, "num_single_layers": 3}, 512),
}
"""{published model: (layer, changes of its config, text tokens of the plain graph)}."""


class Plain(nn.Module):
    """A diffusers transformer of which blocks 0 to k-1 are left, called as its pipeline calls it."""

    def __init__(self, name: str, changes: dict[str, Any]) -> None:
        super().__init__()
        cls = CONFIGS[name]["_class_name"]
        self.config = full_config(cls, {**CONFIGS[name], **changes})
        blocks = {key: self.config[key] for key in ("num_layers", "num_single_layers") if key in self.config}
        last = list(blocks)[-1]
        config = {**CONFIGS[name], **changes, last: blocks[last] - 1}
        self.model = getattr(diffusers, cls).from_config(config).half().eval()
        self._outputs = self.model.proj_out.out_features
        self._features: list[torch.Tensor] = []
        self.model.proj_out = nn.Identity()
        self.model.proj_out.forward = self._keep  # its input is the feature

    def _keep(self, features: torch.Tensor) -> torch.Tensor:
        self._features.append(features)
        return features[..., : self._outputs]

    def forward(self, latents: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Latents [1, c, h, w] (FLUX: [1, N, 64]), text [1, L, D], pooled text [1, D] -> [1, N, C]."""
        given: dict[str, Any] = {"encoder_hidden_states": text, "return_dict": False}
        timestep = torch.full((1,), 261, device=latents.device)
        if isinstance(self.model, diffusers.PixArtTransformer2DModel):
            given |= {"timestep": timestep, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        else:
            given |= {"timestep": timestep.half(), "pooled_projections": pooled}
        if isinstance(self.model, diffusers.FluxTransformer2DModel):
            side = int(latents.shape[1] ** 0.5)
            rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).float()
            given |= {
                "img_ids": ids,
                "txt_ids": torch.zeros(text.shape[1], 3),
                "guidance": torch.ones(1).half(),
            }
        self.model(latents, **given)  # what follows the feature is dead code, which is not exported
        return self._features.pop()


def main() -> None:
    """Write the graphs, compile each for every target, and write the result."""
    bench = Bench(__doc__, THREADS)
    bench.parse()
    quieten_libraries()
    bench.start(**{"tensorrt-rtx": load_flavour("tensorrt-rtx").__version__})
    rows: list[dict[str, Any]] = []
    for name, (layer, changes, tokens) in CASES.items():
        smaller = TRUNKS[name][1] if bench.smoke else changes
        for side in ("ditf", "diffusers"):
            say(f"{name}, {side}")
            rows += in_child(measure, name, layer, smaller, tokens, side, 128 if bench.smoke else SIDE)
        if bench.smoke:
            break
    table: Rows = [
        ("graph", "target", "made by", "kernels", "attention", "copies", "syncs", "moved", "activations")
    ]
    table += [cells(row) for row in rows]
    bench.write("fusion", {"pixels": SIDE, "rows": rows}, table)


def measure(
    name: str, layer: str, changes: dict[str, Any], tokens: int, side: str, pixels: int
) -> list[dict[str, Any]]:
    """Write one graph and compile it for every target."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with workplace() as folder, torch.no_grad():
        if side == "ditf":
            path = write_trunk(folder, name, layer, changes, (pixels, pixels))
        else:
            path = write_plain(folder, name, changes, tokens, pixels)
        graph = Graph.read(path)
        return [
            {"name": name, "layer": layer, "side": side, "target": target, **counted(graph, target)}
            for target in TARGETS
        ]


def write_plain(folder: Path, name: str, changes: dict[str, Any], tokens: int, pixels: int) -> Path:
    """Write folder/plain.onnx."""
    plain = Plain(name, changes)
    config, stride = plain.config, pixels // 8
    latents = torch.randn(1, config["in_channels"], stride, stride).half()
    if "num_single_layers" in config:
        latents = torch.randn(1, stride * stride // 4, config["in_channels"]).half()
    width = config.get("caption_channels") or config["joint_attention_dim"]
    inputs = {
        "latents": latents,
        "text": torch.randn(1, tokens, width).half(),
        "pooled": torch.randn(1, config.get("pooled_projection_dim", 1)).half(),
    }
    write_onnx(plain, inputs, ["features"], folder / "plain.onnx", DEFAULT_OPSET)
    return folder / "plain.onnx"


def counted(graph: Graph, target: str) -> dict[str, Any]:
    """Compile a graph and count."""
    compiled = compile_plan(load_flavour("tensorrt-rtx"), graph, BuildOptions(target), details=True)
    report = Report("", target, read_layers(compiled.log))
    kinds = [kind_of(layer) for layer in report.engine.layers]
    return {
        "kernels": len(kinds) - kinds.count(SYNC),
        "attention": kinds.count(ATTENTION),
        "copies": kinds.count(COPY),
        "syncs": kinds.count(SYNC),
        "bytes": report.bytes_moved,
        "activation_bytes": report.engine.activation_bytes,
        "by_kind": report.kernels,
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format one row of the table."""
    counts = (str(row[key]) for key in ("kernels", "attention", "copies", "syncs"))
    graph = f"{row['name']} to {row['layer']}"
    return (
        graph,
        row["target"],
        row["side"],
        *counts,
        bytes_text(row["bytes"]),
        bytes_text(row["activation_bytes"]),
    )


if __name__ == "__main__":
    main()
