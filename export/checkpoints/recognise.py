"""Recognises what was given as the model, and says what to do with what is no model that ditf exports."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ditf.export.checkpoints.formats.file_kinds import PICKLES, SAFETENSORS, UNFINISHED
from ditf.export.checkpoints.formats.original.layout import Layout, layout_of, prefix_of
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the LoRA that a pipeline saves."""

_LARGEST_CONFIG = 4 << 20  # bytes
_SUPPORTED = (
    "ditf exports PixArt, SD3, SD3.5, FLUX.1, FLUX.2, AuraFlow, Lumina-Image 2.0, Z-Image, Chroma and DiT"
)
_NO_TRANSFORMER = f"its features are of another architecture: {_SUPPORTED}"

_FLUX2 = {
    20: "black-forest-labs/FLUX.2-klein-4B",
    24: "black-forest-labs/FLUX.2-klein-9B",
    48: "black-forest-labs/FLUX.2-dev",
}
"""Hub ids by the number of single-stream blocks."""

_BASES = {
    "AuraFlowTransformer2DModel": "fal/AuraFlow",
    "ChromaTransformer2DModel": "lodestones/Chroma1-HD",
    "DiTTransformer2DModel": "facebook/DiT-XL-2-256",
    "Lumina2Transformer2DModel": "Alpha-VLLM/Lumina-Image-2.0",
    "ZImageTransformer2DModel": "Tongyi-MAI/Z-Image-Turbo",
}

_LORA = r"\.base_layer\.|(?:^|[._])lora(?:[._\d]|$)|\.lokr_|\.hada_w|\.dora_scale"

_ADDED = (
    (
        r"^(?:control_model\.|controlnet_|control_(?:layers|all_x_embedder|noise_refiner)\b|input_hint_block\.)",
        "a ControlNet, not a text-to-image model",
        "give the model itself with --model",
    ),
    (
        r"^(?:ip_adapter\.|image_proj\.|redux_(?:up|down)\.|pulid_)",
        "an image adapter, not a text-to-image model",
        "give the model itself with --model",
    ),
    (r"^nerf_blocks\.|^dec_net\.", "a model that works on pixels through a decoder of its own", _SUPPORTED),
)
"""(part of a name, what the file is, what helps): of files that look like a transformer's otherwise."""

_OTHERS = (
    (
        r"^input_blocks\.0\.0\.|^(?:unet\.)?down_blocks\.\d+\.(?:resnets|attentions)\.",
        "a UNet (Stable Diffusion 1.5, 2 or XL)",
        _NO_TRANSFORMER,
    ),
    (r"(?:^|\.)clip_txt_mapper\.|^clf\.1\.", "a Stable Cascade model", _NO_TRANSFORMER),
    (r"^head\.modulation$|^patch_embedding\.weight$", "a Wan video model", _SUPPORTED),
    (r"^txt_in\.individual_token_refiner\.", "a HunyuanVideo model", _SUPPORTED),
    (r"^transformer_blocks\.0\.img_mod\.1\.", "a Qwen-Image model", _SUPPORTED),
    (r"^patchify_proj\.", "an LTX-Video model", _SUPPORTED),
    (r"^t5_yproj\.", "a Mochi model", _SUPPORTED),
    (r"^patch_embed\.text_proj\.", "a CogVideoX model", _SUPPORTED),
    (r"^blocks\.block0\.blocks\.|^blocks\.0\.mlp\.layer1\.", "a Cosmos model", _SUPPORTED),
    (r"^double_stream_blocks\.|^caption_projection\.0\.linear\.", "a HiDream model", _SUPPORTED),
    (r"^attention_y_norm\.|^caption_norm\.", "a SANA model", _SUPPORTED),
    (r"^mlp_t5\.0\.|^text_embedding_padding$", "a Hunyuan-DiT model", _SUPPORTED),
    (r"^early_stream_modulations\.", "a FLUX.3 model", _SUPPORTED),
    (r"^txtfusion\.", "a Krea 2 model", _SUPPORTED),
    (
        r"^y_embedder\.embedding_table\.",
        "a DiT in the layout of its authors, which diffusers has no key map for",
        "use the diffusers copy: --model facebook/DiT-XL-2-256",
    ),
    (
        r"^(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:conv_in|layers\.0|conv1)\.",
        "a VAE",
        "give the model with --model; --vae takes a VAE's diffusers directory or hub id",
    ),
    (
        r"(?:^|\.)text_model\.e|(?:^|\.)encoder\.block\.0\.|^shared\.weight$|embed_tokens\.weight$"
        r"|(?:^|\.)token_embedding|^(?:token_embd|enc\.blk\.0)\.",
        "a text encoder",
        "give the transformer's file with --model; its text encoders come from --base",
    ),
    (
        r"^emb_params$|^string_to_param",
        "an embedding of a prompt (textual inversion)",
        "give the model itself with --model",
    ),
)
"""(part of a name, what the file is, what helps): of files that hold no transformer that ditf exports."""


def check_transformer_tensors(path: Path, stored: Weights) -> Layout:
    """The layout of a file that was given as a transformer.

    Args:
        path: the file, for messages.
        stored: its tensors; no value is read.

    Raises:
        InputError: the file is no transformer that ditf exports; says what it is and what helps.
    """
    prefix = prefix_of(stored.shapes)
    names = [name.removeprefix(prefix) for name in stored.shapes]
    layout = layout_of(stored.shapes)
    if any(re.search(_LORA, name) for name in names):
        if layout is not None:
            raise InputError(
                f"{path} is a model with a LoRA that is not fused",
                "fuse and unload it in diffusers, then save the model",
            )
        raise InputError(
            f"{path} is a LoRA, not a whole model", "give the model with --model and this file with --lora"
        )
    for pattern, what, fix in _ADDED if layout is not None else (*_ADDED, *_OTHERS):
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path} is {what}", fix)
    if layout is None:
        first = f"its first tensor is {next(iter(stored.shapes))}" if stored.shapes else "it has no tensors"
        raise InputError(f"{path} is no transformer that ditf knows: {first}", _SUPPORTED)
    if layout.class_name == "FluxTransformer2DModel":
        takes, gives = _channels(stored, prefix, layout)
        _check_channels(path, takes, gives)
    return layout


def _channels(stored: Weights, prefix: str, layout: Layout) -> tuple[int, int]:
    """How many channels a FLUX takes and gives."""
    first, last = ("img_in", "final_layer.linear") if layout.original else ("x_embedder", "proj_out")
    takes = stored.shapes.get(f"{prefix}{first}.weight", (0, 0))
    gives = stored.shapes.get(f"{prefix}{last}.weight", (0, 0))
    return takes[-1], gives[0]


def check_channels(where: object, config: Mapping[str, Any]) -> None:
    """Refuse a transformer that takes more than the noisy image, as the config says.

    Raises:
        InputError: it is a FLUX Fill, Canny or Depth, or a model for inpainting.
    """
    takes, gives = config.get("in_channels"), config.get("out_channels")
    if isinstance(takes, int) and isinstance(gives, int):
        _check_channels(where, takes, gives)


def _check_channels(where: object, takes: int, gives: int) -> None:
    if 0 < gives < takes:
        kind = {6: "FLUX.1 Fill", 2: "FLUX.1 Canny or Depth"}.get(takes // gives, "a model for inpainting")
        raise InputError(
            f"{where} takes {takes} channels and gives {gives}, as {kind} does: it reads a second image,"
            " which a bundle does not have",
            "use the model that it was made from, such as FLUX.1-dev",
        )


def base_of(stored: Weights, layout: Layout) -> str:
    """The hub id of the pipeline that a transformer's file most likely belongs to."""
    prefix = prefix_of(stored.shapes)
    shapes = {name.removeprefix(prefix): shape for name, shape in stored.shapes.items()}

    def has(part: str) -> bool:
        return any(part in name for name in shapes)

    if layout.class_name == "FluxTransformer2DModel":
        return f"black-forest-labs/FLUX.1-{'dev' if has('guidance_') else 'schnell'}"
    if layout.class_name == "Flux2Transformer2DModel":
        singles = {name.split(".")[1] for name in shapes if name.startswith("single_") and name[-1] == "t"}
        return _FLUX2.get(len(singles - {"lin", "linear"}), "black-forest-labs/FLUX.2-dev")
    if layout.class_name == "SD3Transformer2DModel":
        if has(".attn2."):
            return "stabilityai/stable-diffusion-3.5-medium"
        normed = has(".ln_q.") or has(".norm_q.")
        return f"stabilityai/stable-diffusion-3{'.5-large' if normed else '-medium-diffusers'}"
    if layout.class_name == "PixArtTransformer2DModel":
        if has("ar_embedder.") or has("aspect_ratio_embedder."):
            return "PixArt-alpha/PixArt-XL-2-1024-MS"
        short = shapes.get("y_embedder.y_embedding", (300,))[0] == 120  # tokens of a caption
        return f"PixArt-alpha/PixArt-{'XL-2-512x512' if short else 'Sigma-XL-2-1024-MS'}"
    return _BASES[layout.class_name]


def folder_error(folder: Path) -> InputError | None:
    """The error for a directory without transformer/ that was given as the model; None if it is unknown."""
    config = _config(folder)
    parent = folder.resolve().parent
    siblings = (parent / "model_index.json").is_file() or (parent / "transformer" / "config.json").is_file()
    name = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    if "ControlNet" in name:
        return InputError(f"{folder} is a ControlNet, not a text-to-image model", "give the model itself")
    if name.startswith("UNet"):
        return InputError(f"{folder} is a UNet", _NO_TRANSFORMER)
    snapshots = sorted((folder / "snapshots").glob("*/model_index.json"))
    if snapshots:
        return InputError(
            f"{folder} is the hub's cache of a model", f"pass {snapshots[-1].parent}, or the hub id"
        )
    component = name or next(
        (file for file in ("scheduler_config.json", "tokenizer_config.json") if (folder / file).is_file()), ""
    )
    if component and siblings:
        also = f", or --model BASE --transformer {folder} for another base" if "Transformer" in name else ""
        return InputError(f"{folder} is one component ({component})", f"pass its parent, {parent}{also}")
    if "Transformer" in name:
        return InputError(
            f"{folder} is only a transformer ({name})",
            f"add the pipeline that its text encoders and VAE are from: --model BASE --transformer {folder}",
        )
    if name.startswith("Autoencoder"):
        return InputError(f"{folder} is a VAE", f"give the model with --model, and --vae {folder}")
    if name:
        return InputError(f"{folder} is one component ({name})", "pass the directory of the whole pipeline")
    return listing_error(str(folder), [path.relative_to(folder).as_posix() for path in folder.glob("*")])


def listing_error(model: str, files: Collection[str]) -> InputError | None:
    """The error for a directory or repository without transformer/, by the names in it; None if unknown.

    Args:
        model: the directory or the hub id.
        files: their paths relative to it.
    """
    top = sorted(name for name in files if "/" not in name)
    if any(PurePosixPath(name).parts[0] == "unet" for name in files):
        return InputError(
            f"{model} has a UNet (Stable Diffusion 1.5, 2 or XL) and no transformer", _NO_TRANSFORMER
        )
    if LORA_FILE in top or "adapter_config.json" in top:
        file = LORA_FILE if LORA_FILE in top else "adapter_model.safetensors"
        return InputError(
            f"{model} is a LoRA, not a whole model",
            f"give the model with --model, and --lora {model}/{file}",
        )
    weights = sorted(name for name in files if name.endswith((*SAFETENSORS, ".gguf")))
    if weights and "config.json" not in top:
        return InputError(
            f"{model} is not in diffusers' layout: it holds {weights[0]}"
            + (f" and {len(weights) - 1} more" if len(weights) > 1 else ""),
            "pass the file itself with --model, and the pipeline that it was made from with --base",
        )
    unfinished = [name for name in top if name.endswith(UNFINISHED)]
    if unfinished:
        return InputError(f"{model} has {unfinished[0]}, a download that has not finished", "run it again")
    pickles = [name for name in top if name.endswith(PICKLES)]
    if pickles:
        return InputError(
            f"{model} holds only pickles such as {pickles[0]}, which can run code when loaded",
            "look for .safetensors files of the same model",
        )
    return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json", _LARGEST_CONFIG)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
