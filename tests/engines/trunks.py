"""Trunks of published geometries with fewer blocks and heads and random weights, as graphs without a VAE.

Heads have their published size, which decides what the compiler fuses; the tiny checkpoints' heads are too
small for that.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import onnx
import torch
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import model_shapes
from ditf.export.checkpoints.noise_schedule import NoiseLevel
from ditf.export.checkpoints.weights import Weights
from ditf.export.estimate.published_configs import CONFIGS, open_configs
from ditf.export.families.base import TrunkSpec
from ditf.export.graph.condition import BakedCondition
from ditf.export.graph.features import FeatureSettings, FeaturesGraph
from ditf.export.graph.precision import FLOAT32
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.conditions import example_condition, usual_text_tokens
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs

FLUX = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 32}
SD3 = {"num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 128,
       "pooled_projection_dim": 32}  # fmt: skip

TRUNKS = {
    "DiT-XL/2 512": ("2", {"num_layers": 3, "num_attention_heads": 2}),
    "PixArt-XL/2 512": (
        "2",
        {"num_layers": 3, "num_attention_heads": 2, "cross_attention_dim": 144, "caption_channels": 32},
    ),
    "SD3 medium": ("2", SD3),
    "SD3.5 medium": ("2", {**SD3, "dual_attention_layers": [0]}),
    "SD3.5 large": ("2", SD3),
    "FLUX.1-dev": ("single.2", {**FLUX, "pooled_projection_dim": 32}),
    "AuraFlow": (
        "single.2",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 3, "num_attention_heads": 2,
         "joint_attention_dim": 32, "caption_projection_dim": 512},
    ),
    "FLUX.2 [klein] 4B": ("single.2", FLUX),
    "Lumina-Image 2.0": (
        "layer.2",
        {"hidden_size": 384, "num_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 4,
         "num_kv_heads": 2, "cap_feat_dim": 32},
    ),
    "Chroma1-HD": ("single.2", {**FLUX, "approximator_hidden_dim": 64, "approximator_layers": 1}),
    "Z-Image-Turbo": (
        "layer.2",
        {"dim": 256, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32},
    ),
}  # fmt: skip
"""{published model: (layer, changes of its config)}: two blocks of each kind run."""


class RandomWeights(Weights):
    """Seeded tensors that keep activations near 1."""

    def __init__(self, shapes):
        bytes_of = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        super().__init__(shapes, bytes_of, dict.fromkeys(shapes, "F32"))

    def _load(self, name):
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        tensor = torch.randn(self.shapes[name], generator=generator)
        if tensor.ndim > 1:
            return tensor / math.sqrt(tensor.shape[-1])
        return tensor * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


class StandInEncoder(nn.Module):
    """A stand-in for the VAE, which is cut off the graph: it only has the right shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, pixels):
        channels, height, _ = self.shape
        stride = pixels.shape[-2] // height
        return pixels[:, :1, ::stride, ::stride].expand(-1, channels, -1, -1)


@torch.no_grad()
def write_trunk(folder, name, layer, changes, size=(128, 128), precision="float16"):
    """Write folder/trunk.onnx: x_t -> features of a published model with a changed config."""
    with open_configs(name) as published:
        config = {**CONFIGS[name], **changes}
        (published.path / "transformer" / "config.json").write_text(json.dumps(config))
        options = ExportOptions(model=name, layer=layer, size=size, precision=precision, discard=(3,))
        plan = plan_from_configs(options, Checkpoint(published.path, name))
    family = plan.family
    weights = RandomWeights(model_shapes(family.transformer_class, family.config))
    condition = example_condition(family, usual_text_tokens(family, None))
    condition = {
        key: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        if value.is_floating_point()
        else torch.ones_like(value)
        for key, value in condition.items()
    }
    tokens = family.text_length(condition)
    spec = TrunkSpec(plan.layer, plan.size, plan.grid, tokens, plan.precision)
    conditioner = family.conditioner(weights, replace(spec, precision=FLOAT32)).eval()
    timestep = plan.entries[0].timestep
    trunk = family.trunk(weights, spec, conditioner(torch.tensor([timestep]), condition))
    noise = torch.randn(plan.noise_shape, generator=torch.Generator().manual_seed(1))
    graph = FeaturesGraph(
        StandInEncoder(noise.shape[1:]),
        BakedCondition(NoiseLevel(*plan.levels[timestep].tolist())),
        trunk,
        noise,
        True,
        FeatureSettings((3,)),
        plan.grid,
        plan.output_dtype,
    )
    image = torch.zeros((1, *size, 3), dtype=torch.uint8)
    write_onnx(graph, {"image": image}, ["features"], folder / "whole.onnx", plan.opset)
    model = onnx.load(folder / "whole.onnx", load_external_data=False)
    x_t = next(node.input[0] for node in model.graph.node if "trunk.embedder.weight" in node.input)
    onnx.save(onnx.utils.Extractor(model).extract_model([x_t], ["features"]), folder / "trunk.onnx")
    return folder / "trunk.onnx"
