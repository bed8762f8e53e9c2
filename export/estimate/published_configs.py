"""Configs of published models, so that an export of them can be estimated without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.export.checkpoints.loading import full_config
from ditf.export.checkpoints.opening import DEMO_CHECKPOINT, vae_part
from ditf.export.families import FAMILIES
from ditf.export.families.base import Family
from ditf.runtime.errors import InputError
from ditf.runtime.files.unfinished import scratch_folder

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
    "Chroma1-HD": {"_class_name": "ChromaTransformer2DModel"},
    "Z-Image-Turbo": {"_class_name": "ZImageTransformer2DModel"},
}
"""Transformer configs by model name. What a config leaves out has the diffusers class's default."""

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
    "Chroma1-HD": "lodestones/Chroma1-HD",
    "Z-Image-Turbo": "Tongyi-MAI/Z-Image-Turbo",
}
"""Hub ids of the models above, by their names."""

VAES = {
    "madebyollin/taesd": 4,
    "madebyollin/taesdxl": 4,
    "madebyollin/taesd3": 16,
    "madebyollin/taef1": 16,
}
"""Hub ids of the published AutoencoderTiny, and the channels of their latents."""

_STAGES = 4  # of the encoder: a stride of 8 in every published VAE


def published_family(name: str) -> Family:
    """The family of a published model, by its name."""
    config = CONFIGS[name]
    family = next(f for f in FAMILIES if f.transformer_class == config["_class_name"])
    return family(full_config(family.transformer_class, config))


@contextmanager
def open_configs(model: str) -> Iterator[Checkpoint]:
    """Open a checkpoint of which only the configs are read.

    Args:
        model: "demo", a directory, or a published model by its name or hub id; nothing is downloaded.

    Raises:
        InputError: the model is none of these.
    """
    path = Path(model).expanduser()
    published = {**{name.lower(): name for name in CONFIGS}, **{i.lower(): n for n, i in HUB_IDS.items()}}
    if model == DEMO:
        yield Checkpoint(DEMO_CHECKPOINT, DEMO)
    elif model and path.is_dir():
        yield Checkpoint(path, model)
    elif model.lower() in published:
        with scratch_folder("ditf-configs-") as folder:
            _write_configs(folder, published[model.lower()])
            yield Checkpoint(folder, model)
    else:
        raise InputError(
            f"{model!r:.80} is no directory, and no published model whose config is known",
            f"pass a directory that holds its configs, or one of {', '.join([DEMO, *HUB_IDS.values()])}",
        )


@contextmanager
def open_vae_configs(vae: str) -> Iterator[Part]:
    """Open a VAE for --vae of which only the config is read.

    Args:
        vae: a directory, or the hub id of a published AutoencoderTiny; nothing is downloaded.

    Raises:
        InputError: the VAE is neither.
    """
    if vae and Path(vae).expanduser().is_dir():
        yield vae_part(Checkpoint(Path(vae).expanduser(), vae))
    elif vae.lower() in VAES:
        with scratch_folder("ditf-configs-") as folder:
            config = {"_class_name": "AutoencoderTiny", "latent_channels": VAES[vae.lower()]}
            (folder / "config.json").write_text(json.dumps(config), "utf-8")
            yield vae_part(Checkpoint(folder, vae))
    else:
        raise InputError(
            f"--vae {vae!r:.80} is no directory, and no published VAE whose config is known",
            f"pass a directory that holds its config, or one of {', '.join(VAES)}",
        )


def _write_configs(folder: Path, name: str) -> None:
    """Write the configs of a published model in diffusers' layout; of VAE and scheduler only what is read."""
    family = published_family(name)
    kl = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * _STAGES,
        "up_block_types": ["UpDecoderBlock2D"] * _STAGES,
        "layers_per_block": 2,
        "latent_channels": family.latent_channels,
        "use_quant_conv": family.latent_channels == 4,  # those of 16 channels, SD3's and FLUX's, have none
        "use_post_quant_conv": family.latent_channels == 4,
    }
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    ddpm = {"_class_name": "DDIMScheduler", "beta_schedule": "linear"}
    configs = {
        "transformer/config.json": CONFIGS[name],
        # Other classes than AutoencoderKL have one checkpoint, whose config is all defaults.
        "vae/config.json": {
            "_class_name": family.vae_class,
            **(kl if family.vae_class == "AutoencoderKL" else {}),
        },
        "scheduler/scheduler_config.json": ddpm if family.ddpm else flow,
    }
    for file, config in configs.items():
        (folder / file).parent.mkdir()
        (folder / file).write_text(json.dumps(config), "utf-8")
