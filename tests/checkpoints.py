"""Tiny checkpoints of the real diffusers classes, saved as their pipelines save them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

PIXART_BLOCKS = 4
PIXART_WIDTH = 48
PIXART_CELL = 8  # image pixels of a token: patch 2 x VAE stride 4


def save_tiny_pixart(folder: Path, **transformer: object) -> None:
    """A 4-block PixArt of width 48 with an 8x VAE-and-patch stride, 64 px, all random, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PixArtAlphaPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=T5EncoderModel(
                T5Config(vocab_size=140, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
            ),
            vae=tiny_vae(),
            transformer=tiny_pixart_transformer(**transformer),
            scheduler=DPMSolverMultistepScheduler(),
        )
    pipeline.save_pretrained(folder)


def tiny_pixart_transformer(**config: object) -> PixArtTransformer2DModel:
    """Random weights large enough that every branch and gate changes the features."""
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


def tiny_vae() -> AutoencoderKL:
    """An AutoencoderKL of stride 4 with attention in its middle block."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that spells: one token a letter."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.'"]
    return T5Tokenizer(vocab=vocabulary)
