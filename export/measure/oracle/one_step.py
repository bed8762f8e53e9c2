"""How a diffusers pipeline is made to call its transformer once, at a timestep and on latents that are given.

A pass goes through the pipeline's own `__call__`, without classifier-free guidance, so that encoding prompts,
masks, packing, position ids, the scale of the timestep and guidance are the pipeline's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from ditf.export.families.base import Condition

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_STEPS = 1000


class OneStep:
    """One step of a pipeline. The defaults are those of most text-to-image pipelines of flow matching.

    Attributes:
        pipelines: the names of the diffusers pipelines that are known.
        flow: whether the pipelines sample by flow matching, whatever scheduler the checkpoint was saved with.
        settings: arguments of the pipeline's call.
        thinking: as the pipeline renders the tokenizer's chat template; None where it renders none.
        text_before: text tokens before those that --text-tokens counts.
        encoder: what makes x_0, for the record.
        remark: what is done beside the pipeline's call, for the record.
    """

    pipelines: ClassVar[tuple[str, ...]]
    flow: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    thinking: ClassVar[bool | None] = None
    text_before: ClassVar[int] = 0
    encoder: ClassVar[str] = "vae.encode, and the inverse of the pipeline's decoding"
    remark: ClassVar[str] = ""

    def run(
        self,
        pipe: Any,
        x_t: torch.Tensor,
        timestep: int,
        condition: Mapping[str, Any],
        guidance: float | None = None,
        text_tokens: int | None = None,
    ) -> None:
        """Call the pipeline for one step.

        Args:
            pipe: the pipeline.
            x_t: [1, c, h', w'].
            timestep: 0..999.
            condition: the condition as arguments of the pipeline's call: {"prompt": text} or embeddings.
            guidance: of guidance-distilled models.
            text_tokens: the number of T5 tokens that the transformer is given (--text-tokens); None for all.
        """
        pipe.scheduler = self.driver(timestep)
        stride = self.stride(pipe)

        with changed_arguments(pipe.transformer, partial(self.text_given, tokens=text_tokens)):
            pipe(
                **condition,
                **self.settings,
                **self.model_settings(pipe, guidance),
                **self.noise_level(timestep),
                height=x_t.shape[2] * stride,
                width=x_t.shape[3] * stride,
                num_inference_steps=1,
                latents=self.pack(pipe, x_t),
                output_type="latent",
            )

    def driver(self, timestep: int) -> Any:
        """A scheduler of one step, which gives the pipeline's loop the exact timestep and nothing else."""
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps = partial(scheduler.set_timesteps, timesteps=[float(timestep)])
        return scheduler

    def noise_level(self, timestep: int) -> dict[str, Any]:
        """The argument of the pipeline's call that makes it take one step from a noise level."""
        return {"sigmas": [timestep / _STEPS]}

    def model_settings(self, pipe: Any, guidance: float | None) -> dict[str, Any]:
        """Arguments of the pipeline's call that depend on the model."""
        return {}

    def embeddings(self, condition: Condition) -> dict[str, Any]:
        """The arguments of the pipeline's call for the tensors of --prompt-embeds."""
        return {name: tensor for name, tensor in condition.items() if name != "guidance"}

    def stride(self, pipe: Any) -> int:
        """Image pixels along the side of a pixel of x_t."""
        return int(pipe.vae_scale_factor)

    def pack(self, pipe: Any, x_t: torch.Tensor) -> torch.Tensor:
        """The latents as the pipeline's call takes them."""
        return x_t

    def pixels(self, pipe: Any, image: Image.Image) -> torch.Tensor:
        """What the pipeline's image processor makes of an image, float32 [1, 3, H, W]."""
        prepared: torch.Tensor = pipe.image_processor.preprocess(image, image.height, image.width)
        return prepared

    def encode(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        """x_0 [1, c, h', w'].

        A pipeline without an image-to-image path divides by the scale and adds the shift before it decodes.
        """
        found = pipe.vae.encode(pixels)
        z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        config = pipe.vae.config
        return (z - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def text_given(self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int | None) -> Arguments:
        """The transformer's arguments with the first text tokens only; None for all of them."""
        if tokens is None:
            return args, kwargs
        end, cut = self.text_before + tokens, dict(kwargs)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            if cut.get(name) is not None:
                cut[name] = cut[name][:, :end]
        if cut.get("txt_ids") is not None:
            cut["txt_ids"] = cut["txt_ids"][..., :end, :]
        if cut.get("attention_mask") is not None:  # over text and image
            mask, beyond = cut["attention_mask"], kwargs["encoder_hidden_states"].shape[1]
            cut["attention_mask"] = torch.cat([mask[:, :end], mask[:, beyond:]], dim=1)
        return args, cut


@contextmanager
def changed_arguments(module: nn.Module, change: Callable[..., Arguments]) -> Iterator[None]:
    """Within this context a module is called with other arguments."""
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: change(args, kwargs), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def mean_of_posterior(vae: Any) -> Iterator[None]:
    """Within this context a VAE's posterior has no spread: a sample of it is its mean."""
    encode = vae.encode

    def encode_exactly(pixels: torch.Tensor) -> Any:
        found = encode(pixels)
        if hasattr(found, "latent_dist"):
            found.latent_dist.std = torch.zeros_like(found.latent_dist.std)
        return found

    vae.encode = encode_exactly
    try:
        yield
    finally:
        del vae.encode
