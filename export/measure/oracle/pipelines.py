"""The pipelines of every family: what differs between them, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ditf.export.families.base import Condition
from ditf.export.measure.oracle.one_step import Arguments, OneStep, changed_arguments, mean_of_posterior


class _Flux(OneStep):
    pipelines = ("FluxPipeline",)
    settings: ClassVar[Mapping[str, Any]] = {}
    encoder = "FluxImg2ImgPipeline._encode_vae_image"
    _image_to_image = "FluxImg2ImgPipeline"

    def model_settings(self, pipe: Any, guidance: float | None) -> dict[str, Any]:
        if pipe.transformer.config.guidance_embeds:
            return {"guidance_scale": guidance, "max_sequence_length": 512}
        return {"max_sequence_length": 256}  # schnell's model card calls the pipeline so

    def pack(self, pipe: Any, x_t: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = pipe._pack_latents(x_t, *x_t.shape)
        return packed

    def encode(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        other = getattr(diffusers, self._image_to_image)(**pipe.components)
        with mean_of_posterior(pipe.vae):
            x_0: torch.Tensor = other._encode_vae_image(pixels, torch.Generator())
        return x_0


class _Chroma(_Flux):
    pipelines = ("ChromaPipeline",)
    settings: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    encoder = "ChromaImg2ImgPipeline._encode_vae_image"
    _image_to_image = "ChromaImg2ImgPipeline"

    def model_settings(self, pipe: Any, guidance: float | None) -> dict[str, Any]:
        return {}

    def embeddings(self, condition: Condition) -> dict[str, Any]:
        mask = condition["prompt_attention_mask"].to(torch.float32)  # as the pipeline makes it
        return {"prompt_embeds": condition["prompt_embeds"], "prompt_attention_mask": mask}


class _MaskedChroma(_Chroma):
    """Chroma without the padding that its authors' code masks, whose mask the pipeline adds to the logits."""

    remark = ", without the text tokens that are masked"

    def text_given(self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int | None) -> Arguments:
        image = kwargs["hidden_states"].shape[1]
        read = int(kwargs["attention_mask"][0, :-image].sum())
        args, cut = super().text_given(args, kwargs, read if tokens is None else min(read, tokens))
        return args, {**cut, "attention_mask": None}


class _Flux2(OneStep):
    pipelines = ("Flux2KleinPipeline",)
    thinking = False
    encoder = "Flux2KleinPipeline._encode_vae_image"

    def stride(self, pipe: Any) -> int:
        return 2 * int(pipe.vae_scale_factor)  # x_t has squares of 2x2 latents as its pixels

    def encode(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        x_0: torch.Tensor = pipe._encode_vae_image(pixels, torch.Generator())
        return x_0


class _SD3(OneStep):
    pipelines = ("StableDiffusion3Pipeline",)
    text_before = 77  # CLIP's
    encoder = "StableDiffusion3Img2ImgPipeline.prepare_latents"

    def encode(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        other = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
        other.scheduler, start = self._noiseless()
        with mean_of_posterior(pipe.vae):
            x_0: torch.Tensor = other.prepare_latents(
                pixels, start, 1, 1, torch.float32, pixels.device, torch.Generator()
            )
        return x_0

    def _noiseless(self) -> tuple[Any, torch.Tensor]:
        """A scheduler at a noise level of 0, where the noisy latents are x_0, and its timestep."""
        scheduler = self.driver(0)
        scheduler.set_timesteps(sigmas=[0.0])
        return scheduler, scheduler.timesteps


class _ZImage(_SD3):
    pipelines = ("ZImagePipeline",)
    settings: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}  # any other runs a negative prompt too
    thinking = True
    text_before = 0
    encoder = "ZImageImg2ImgPipeline.prepare_latents"

    def encode(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        other = diffusers.ZImageImg2ImgPipeline(**pipe.components)
        other.scheduler, start = self._noiseless()
        channels, (height, width) = pipe.transformer.in_channels, pixels.shape[2:]
        with mean_of_posterior(pipe.vae):
            x_0: torch.Tensor = other.prepare_latents(
                pixels, start, 1, channels, height, width, torch.float32, pixels.device, torch.Generator()
            )
        return x_0

    def embeddings(self, condition: Condition) -> dict[str, Any]:
        tokens = int(condition["prompt_attention_mask"].sum())
        return {"prompt_embeds": [condition["prompt_embeds"][0, :tokens]]}

    def text_given(self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int | None) -> Arguments:
        latents, timestep, texts = args
        return (latents, timestep, [text[:tokens] for text in texts]), kwargs


class _Lumina2(OneStep):
    pipelines = ("Lumina2Pipeline",)


class _AuraFlow(OneStep):
    pipelines = ("AuraFlowPipeline",)

    def embeddings(self, condition: Condition) -> dict[str, Any]:
        embeds = condition["prompt_embeds"]  # zero where it is masked
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(embeds.shape[:2])}


class _Diffusion(OneStep):
    """A pipeline whose loop takes integer timesteps of a DDPM schedule."""

    flow = False

    def driver(self, timestep: int) -> Any:
        return diffusers.DDPMScheduler(timestep_spacing="leading", steps_offset=timestep)

    def noise_level(self, timestep: int) -> dict[str, Any]:
        return {}


class _PixArt(_Diffusion):
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    # The captions are taken as they are written, and the size as it is given.
    settings: ClassVar[Mapping[str, Any]] = {
        "guidance_scale": 1.0,
        "clean_caption": False,
        "use_resolution_binning": False,
    }


class _DiT(_Diffusion):
    """DiTPipeline draws its own square latents, which are replaced where it calls its transformer."""

    pipelines = ("DiTPipeline",)

    def run(
        self,
        pipe: Any,
        x_t: torch.Tensor,
        timestep: int,
        condition: Mapping[str, Any],
        guidance: float | None = None,
        text_tokens: int | None = None,
    ) -> None:
        pipe.scheduler = self.driver(timestep)
        label = condition["class_label"]
        if label is None:
            label = pipe.transformer.config.num_embeds_ada_norm
        with changed_arguments(pipe.transformer, lambda args, kwargs: ((x_t, *args[1:]), kwargs)):
            pipe([label], guidance_scale=1.0, num_inference_steps=1, generator=torch.Generator())

    def pixels(self, pipe: Any, image: Image.Image) -> torch.Tensor:
        prepared: torch.Tensor = VaeImageProcessor(do_resize=False).preprocess(image)
        return prepared


_STEPS: Mapping[str, type[OneStep]] = {
    "dit": _DiT,
    "pixart": _PixArt,
    "sd3": _SD3,
    "flux": _Flux,
    "flux2": _Flux2,
    "auraflow": _AuraFlow,
    "lumina2": _Lumina2,
    "zimage": _ZImage,
    "chroma": _Chroma,
}
"""The pipeline of every family, by its name."""


def step_of(family: str, text_padding: str | None = None) -> OneStep:
    """One step of a family's pipeline.

    Args:
        family: its name.
        text_padding: how the padding of the text is read, in families of which that can be chosen.
    """
    return _MaskedChroma() if text_padding == "masked" else _STEPS[family]()


def pipeline_of(family: str, named: str) -> str:
    """The diffusers pipeline that runs a checkpoint: the one it names if that is a known one, else the first.

    Args:
        family: name of the family.
        named: `_class_name` of model_index.json.
    """
    known = _STEPS[family].pipelines
    return named if named in known else known[0]
