"""Tiny checkpoints of the real diffusers classes, saved as their pipelines save them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.checkpoint_parts import (
    TINY_VAE,
    lively,
    seeded,
    tiny_clip_config,
    tiny_clip_tokenizer,
    tiny_gemma,
    tiny_gemma_tokenizer,
    tiny_qwen3,
    tiny_qwen_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
)

PIXART_BLOCKS = 4
PIXART_WIDTH = 48
PIXART_CELL = 8  # image pixels of a token: patch 2 x VAE stride 4
CLASSES = 10
UNTRAINED_MASSIVE = {5: 60.0, 41: -40.0}


def save_tiny_dit(folder: Path) -> None:
    """A 4-block DiT of width 48 over latents, with class names."""
    with seeded():
        transformer = lively(
            DiTTransformer2DModel(
                num_attention_heads=3,
                attention_head_dim=16,
                in_channels=4,
                out_channels=8,
                num_layers=4,
                sample_size=16,
                num_embeds_ada_norm=CLASSES,
            )
        )
        pipeline = DiTPipeline(
            transformer, tiny_vae(), DDIMScheduler(), id2label={0: "tench, Tinca tinca", 7: "cock"}
        )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    document = json.loads(index.read_text())
    # the pipeline does not write its labels; published checkpoints have them here
    document["id2label"] = {"0": "tench, Tinca tinca", "7": "cock"}
    index.write_text(json.dumps(document))


def save_tiny_pixart(folder: Path, **transformer: object) -> None:
    """A 4-block PixArt of width 48 with an 8x VAE-and-patch stride, 64 px, all random, seeded."""
    _save_pixart(folder, PixArtAlphaPipeline, transformer)


def save_tiny_sigma(folder: Path) -> None:
    """PixArt-Sigma: the same transformer without micro-conditions, 300 caption tokens."""
    _save_pixart(folder, PixArtSigmaPipeline, {"use_additional_conditions": False, "interpolation_scale": 2})


def save_tiny_pixart_1024(folder: Path) -> None:
    """PixArt-alpha with the micro-conditions of its 1024 px models."""
    _save_pixart(folder, PixArtAlphaPipeline, {"sample_size": 128})


def _save_pixart(folder, pipeline_class, transformer):
    with seeded():
        pipeline = pipeline_class(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=tiny_t5(),
            vae=tiny_vae(),
            transformer=tiny_pixart_transformer(**transformer),
            scheduler=DPMSolverMultistepScheduler(),
        )
    pipeline.save_pretrained(folder)


def tiny_pixart_transformer(**config: object) -> PixArtTransformer2DModel:
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": PIXART_BLOCKS,
        "cross_attention_dim": PIXART_WIDTH,
        "sample_size": 16,
        "caption_channels": 32,
        **config,
    }
    model = PixArtTransformer2DModel(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return model


def save_tiny_sd3(folder: Path) -> None:
    """SD3: 4 blocks, no QK-norm, one attention each."""
    _save_sd3(folder, dual_attention_layers=(), qk_norm=None)


def save_tiny_sd35(folder: Path) -> None:
    """SD3.5 medium: QK-norm, a second attention in the first two blocks."""
    _save_sd3(folder, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def save_tiny_sd35_large(folder: Path) -> None:
    """SD3.5 large: QK-norm, one attention."""
    _save_sd3(folder, dual_attention_layers=(), qk_norm="rms_norm")


def _save_sd3(folder, **config):
    with seeded():
        transformer = lively(
            SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=4,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=32,
                caption_projection_dim=48,
                pooled_projection_dim=24,
                pos_embed_max_size=24,
                **config,
            )
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(tiny_clip_config(16, 8)),
            tokenizer=tiny_clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(16, 16)),
            tokenizer_2=tiny_clip_tokenizer(),
            text_encoder_3=tiny_t5(),
            tokenizer_3=tiny_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_flux(folder: Path) -> None:
    """FLUX.1-dev: 2 double and 3 single blocks, guidance."""
    _save_flux(folder, guidance_embeds=True)


def save_tiny_schnell(folder: Path) -> None:
    """FLUX.1-schnell: no guidance."""
    _save_flux(folder, guidance_embeds=False)


def _save_flux(folder, **config):
    with seeded():
        transformer = lively(
            FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 6, 6),
                **config,
            )
        )
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(tiny_clip_config(16, 16)),
            tokenizer=tiny_clip_tokenizer(),
            text_encoder_2=tiny_t5(),
            tokenizer_2=tiny_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_chroma(folder: Path) -> None:
    """Chroma: 2 double and 3 single blocks."""
    with seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a class of diffusers that this one uses
        transformer = lively(
            ChromaTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                approximator_hidden_dim=32,
                approximator_layers=2,
            )
        )
        pipeline = ChromaPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=tiny_t5(),
            tokenizer=tiny_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_auraflow(folder: Path) -> None:
    """AuraFlow: 2 joint and 3 single blocks."""
    with seeded():
        transformer = lively(
            AuraFlowTransformer2DModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=2,
                num_single_dit_layers=3,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=32,
                caption_projection_dim=48,
                pos_embed_max_size=256,
            )
        )
        config = UMT5Config(vocab_size=140, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
        pipeline = AuraFlowPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            vae=tiny_vae(),
            text_encoder=UMT5EncoderModel(config),
            tokenizer=tiny_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_flux2(folder: Path) -> None:
    """FLUX.2 [klein]: 2 double and 3 single blocks."""
    with seeded():
        transformer = lively(
            Flux2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=3,
                joint_attention_dim=48,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            )
        )
        vae = AutoencoderKLFlux2(**TINY_VAE)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        pipeline = Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=tiny_qwen3(28),  # the pipeline reads what enters layers 9, 18 and 27
            tokenizer=tiny_qwen_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_lumina2(folder: Path) -> None:
    """Lumina2: 2 refiners and 3 layers, 4 heads over 2 of keys and values."""
    with seeded():
        transformer = lively(
            Lumina2Transformer2DModel(
                sample_size=16,
                in_channels=4,
                hidden_size=48,
                num_layers=3,
                num_refiner_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=16,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 24, 24),
                cap_feat_dim=32,
            )
        )
        pipeline = Lumina2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=tiny_gemma(),
            tokenizer=tiny_gemma_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_tiny_zimage(folder: Path) -> None:
    """Z-Image: 2 refiners and 3 layers."""
    with seeded():
        transformer = lively(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=48,
                n_layers=3,
                n_refiner_layers=2,
                n_heads=3,
                n_kv_heads=3,
                axes_dims=[4, 6, 6],
                axes_lens=[520, 24, 24],
                cap_feat_dim=16,
            )
        )
        transformer.x_pad_token.data.normal_()  # zeros until it is trained
        transformer.cap_pad_token.data.normal_()
        pipeline = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=tiny_qwen3(3),
            tokenizer=tiny_qwen_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def save_untrained(folder: Path) -> None:
    """A 12-block DiT in pixels, untrained, with two planted massive channels."""
    with seeded(20260):
        model = DiTTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=12,
            sample_size=256,
            patch_size=8,
            num_embeds_ada_norm=1,
        )
    projection = model.pos_embed.proj
    with torch.no_grad():
        projection.weight *= 6.0  # the image above the position embedding
        for channel, value in UNTRAINED_MASSIVE.items():
            projection.bias[channel] = value
    model.save_pretrained(folder / "transformer")
    DDPMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")


SAVE: dict[str, Callable[[Path], None]] = {
    "dit": save_tiny_dit,
    "untrained": save_untrained,
    "pixart": save_tiny_pixart,
    "pixart-1024": save_tiny_pixart_1024,
    "sigma": save_tiny_sigma,
    "sd3": save_tiny_sd3,
    "sd35": save_tiny_sd35,
    "sd35-large": save_tiny_sd35_large,
    "flux": save_tiny_flux,
    "schnell": save_tiny_schnell,
    "auraflow": save_tiny_auraflow,
    "flux2": save_tiny_flux2,
    "lumina2": save_tiny_lumina2,
    "zimage": save_tiny_zimage,
    "chroma": save_tiny_chroma,
}
"""Every tiny checkpoint by name."""


def planted(source: Path, folder: Path, part: str, biases: dict[str, float]) -> Path:
    """A copy of a checkpoint with the bias of some modules set to a value at outputs 3 and 5.

    Where a module has no bias, its weights there are multiplied.
    """
    shutil.copytree(source, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for module, value in biases.items():
        if f"{module}.bias" in tensors:
            bias = tensors[f"{module}.bias"]
            bias[3], bias[5] = value, -value
        else:
            tensors[f"{module}.weight"][[3, 5]] *= value
    save_file(tensors, path, {"format": "pt"})
    return folder
