"""What the tiny checkpoints are made of: a VAE, text encoders, and tokenizers that spell."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz,.'"
TINY_VAE = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}


@contextmanager
def seeded(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def lively(model):
    """Random weights large enough that every branch and gate changes the features."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            elif "norm" in name and parameter.ndim == 1 and "linear" not in name:
                parameter.mul_(1.0 + 0.5 * torch.rand_like(parameter))
    return model


def tiny_qwen3(layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer that spells, with a template for chats."""
    symbols = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "Ġ", "Ċ", *LETTERS]
    return Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=[],
        extra_special_tokens=symbols[1:5],
        chat_template="{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    )


def tiny_gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that spells, but for the pipeline's system prompt."""
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)


def tiny_vae(**config: object) -> AutoencoderKL:
    """An AutoencoderKL of stride 4 with attention in its middle block."""
    return AutoencoderKL(**TINY_VAE, **config)


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=140, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4))


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that spells: one token a letter."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocabulary)


def tiny_clip_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells."""
    symbols = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], model_max_length=77
    )
