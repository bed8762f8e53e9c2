"""Configs of published models, to count and time what an export of them would be without a download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ditf.export.checkpoint import DEMO, Checkpoint
from ditf.export.demo import DEMO_CHECKPOINT
from ditf.export.families import FAMILIES
from ditf.export.families.base import Condition, Family
from ditf.export.pretrained import full_config
from ditf.runtime.errors import InputError

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "DiT-XL/2 512": {"_class_name": "DiTTransformer2DModel", "sample_size": 64, "out_channels": 8},
    "PixArt-XL/2 512": {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 64,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
    },
    "SD3 medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "SD3.5 medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5 large": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 38,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "FLUX.1-dev": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "FLUX.1-schnell": {"_class_name": "FluxTransformer2DModel"},
    "AuraFlow": {"_class_name": "AuraFlowTransformer2DModel"},
    "FLUX.2 [klein] 4B": {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "Lumina-Image 2.0": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304},
}
"""By name; what a config leaves out is the class's own default."""

HUB_IDS = {
    "DiT-XL/2 512": "facebook/DiT-XL-2-512",
    "PixArt-XL/2 512": "PixArt-alpha/PixArt-XL-2-512x512",
    "SD3 medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "SD3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "SD3.5 large": "stabilityai/stable-diffusion-3.5-large",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "AuraFlow": "fal/AuraFlow",
    "FLUX.2 [klein] 4B": "black-forest-labs/FLUX.2-klein-4B",
    "Lumina-Image 2.0": "Alpha-VLLM/Lumina-Image-2.0",
}
"""Of the models above, by their names."""

_TEXT = {"pixart": 120, "sd3": 77 + 256, "flux": 512, "auraflow": 256, "flux2": 512, "lumina2": 256}
_LONGEST = {"pixart": 300}
"""Where a model of the family, PixArt-Sigma, reads more."""
_SHORT_PROMPT = {"pixart": 8}
"""Tokens of a short prompt, where the masked ones that follow are dropped."""
_TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "cap_feat_dim")  # a family has one of them
_UNMASKED = ("auraflow", "flux2")  # their text has neither a mask nor a pooled embedding
_DDPM = ("dit", "pixart")  # the others are flow matching
_STAGES = 4  # of the encoder: a stride of 8 in every published VAE


def published_family(name: str) -> Family:
    """The family of a published config."""
    config = CONFIGS[name]
    family = next(f for f in FAMILIES if f.transformer_class == config["_class_name"])
    return family(full_config(family.transformer_class, config))


@contextmanager
def open_configs(model: str) -> Iterator[Checkpoint]:
    """A checkpoint of which only the configs are read: the demo, a directory, or a published model.

    Args:
        model: a published one by its name or its hub id; nothing is downloaded.

    Raises:
        InputError: none of these.
    """
    path = Path(model).expanduser()
    published = {**{name.lower(): name for name in CONFIGS}, **{i.lower(): n for n, i in HUB_IDS.items()}}
    if model == DEMO:
        yield Checkpoint(DEMO_CHECKPOINT, DEMO)
    elif model and path.is_dir():
        yield Checkpoint(path, model)
    elif model.lower() in published:
        with tempfile.TemporaryDirectory(prefix="ditf-configs-") as folder:
            _write_configs(Path(folder), published[model.lower()])
            yield Checkpoint(Path(folder), model)
    else:
        raise InputError(
            f"{model!r:.80} is no directory, and no published model whose config is known",
            f"pass a directory that holds its configs, or one of {', '.join([DEMO, *HUB_IDS.values()])}",
        )


def _write_configs(folder: Path, name: str) -> None:
    """The configs of a published model in diffusers' layout; of VAE and scheduler, what matters here."""
    family = published_family(name)
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * _STAGES,
        "up_block_types": ["UpDecoderBlock2D"] * _STAGES,
        "layers_per_block": 2,
        "latent_channels": family.latent_channels,
        "use_quant_conv": family.latent_channels == 4,  # those of 16 channels, SD3's and FLUX's, have none
        "use_post_quant_conv": family.latent_channels == 4,
    }
    if family.name == "flux2":
        vae = {"_class_name": "AutoencoderKLFlux2"}  # all defaults
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    ddpm = {"_class_name": "DDIMScheduler", "beta_schedule": "linear"}
    configs = {
        "transformer/config.json": CONFIGS[name],
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": ddpm if family.name in _DDPM else flow,
    }
    for file, config in configs.items():
        (folder / file).parent.mkdir()
        (folder / file).write_text(json.dumps(config), "utf-8")


def prompt_tokens(family: Family, text_tokens: int | None) -> int | None:
    """Text tokens that an export would keep, for `example_condition`; of a short prompt where the rest goes.

    Args:
        text_tokens: of --text-tokens.
    """
    if not family.takes_prompt:
        return None
    tokens = _SHORT_PROMPT.get(family.name, _most_tokens(family))
    return tokens if text_tokens is None else min(tokens, family.leading_tokens + text_tokens)


def _most_tokens(family: Family) -> int:
    if family.name == "flux" and not family.takes_guidance:
        return 256  # schnell's
    return _TEXT[family.name]


def longest_text(family: Family) -> int:
    """Text tokens of a condition at the most."""
    return max(_most_tokens(family), _LONGEST.get(family.name, 0))


def example_condition(family: Family, text_tokens: int | None = None) -> Condition:
    """Tensors of the shapes that a model's text encoders give, filled with zeros.

    Args:
        text_tokens: unmasked text tokens; all by default.
    """
    if not family.takes_prompt:
        return {"class_labels": torch.zeros(1, dtype=torch.int64)}
    tokens = text_tokens or _most_tokens(family)
    width = next(family.config[key] for key in _TEXT_WIDTHS if family.config.get(key))
    condition = {"prompt_embeds": torch.zeros(1, tokens, width)}
    if "pooled_projection_dim" in family.config:
        condition["pooled_prompt_embeds"] = torch.zeros(1, family.config["pooled_projection_dim"])
    elif family.name not in _UNMASKED:
        condition["prompt_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    if family.takes_guidance:
        condition["guidance"] = torch.zeros(1)
    return condition
