"""What the reference gives the transformer, against what the checkpoint's own diffusers pipeline gives it."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.nn import functional

from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.families import family_of
from tests.checkpoints import SAVE

SIZE = (48, 80)
PROMPT = "a cat, asleep"
LABEL = 7

CALLS = {
    "dit": {"class_labels": [LABEL], "guidance_scale": 1.0},
    "flux": {"guidance_scale": 3.5},
    # the model card of FLUX.1 [schnell] asks for as many tokens as it was trained with
    "schnell": {"max_sequence_length": 256, "guidance_scale": 3.5},
    "zimage": {"guidance_scale": 0.0},
}
"""Arguments of pipelines beside prompt, size and latents; there is no pass for classifier-free guidance."""

OTHERS = {"guidance_scale": 1.0, "use_resolution_binning": False}  # the latter is PixArt's
UNREAD = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "guidance"}
"""Parameters of a transformer that change nothing where they are None, empty or False."""


class _Decoding(Exception):
    """Raised where the pipeline would decode."""


@dataclass
class Call:
    """A call of a pipeline, of two steps.

    Attributes:
        given: the arguments of the transformer in the first step, by their names.
        timestep: of the first step.
        latents: after the last step, packed where the pipeline packs them.
        decoded: what the VAE is given to decode.
        vae: the pipeline's.
    """

    given: dict[str, object]
    timestep: float
    latents: torch.Tensor
    decoded: torch.Tensor
    vae: torch.nn.Module


def called(folder, size, latents, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of classes of diffusers that it uses itself
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if folder.name == "tiny-pixart-1024":  # the pipeline knows such a model by its size
        pipeline.transformer.register_to_config(sample_size=128)
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # whose timesteps are not shifted
        arguments["sigmas"] = [0.26, 0.1]
    given, stepped, decoded = {}, [], []
    step = pipeline.scheduler.step

    def transformer_hook(module, args, kwargs):
        if not given:
            given.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def recorded_step(*args, **kwargs):
        made = step(*args, **kwargs)
        stepped.append(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    def decode(latents, *args, **kwargs):
        decoded.append(latents)
        raise _Decoding

    pipeline.transformer.register_forward_pre_hook(transformer_hook, with_kwargs=True)
    pipeline.scheduler.step = recorded_step
    pipeline.vae.decode = decode
    accepted = inspect.signature(pipeline.__call__).parameters
    known = {"height": size[0], "width": size[1], "latents": latents, "prompt": PROMPT, **arguments}
    with pytest.raises(_Decoding):
        pipeline(num_inference_steps=2, **{key: value for key, value in known.items() if key in accepted})
    return Call(given, float(pipeline.scheduler.timesteps[0]), stepped[-1], decoded[0], pipeline.vae)


def pieces(value, name=""):
    """Tensors by name; lists and dictionaries of tensors are taken apart."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from pieces(one, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from pieces(one, f"{name}.{index}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, of what diffusers does
@pytest.mark.parametrize("name", [name for name in SAVE if name != "untrained"])
def test_the_reference_gives_the_transformer_what_its_pipeline_does(checkpoint, name):
    """Latents, timestep, text, masks, positions and guidance; and the VAE's latents have x_0's scale."""
    folder = Checkpoint(checkpoint(name), name)
    family = family_of(folder)
    space = LatentSpace.of(folder, family.latent_channels, family.shifts_latents)
    # DiTPipeline makes square images of the model's own size, and draws the latents itself
    size = SIZE if family.takes_prompt else (family.sample_size * space.stride,) * 2
    latents = torch.randn(1, space.channels, *(side // space.stride for side in size))
    packs = family.name in ("flux", "chroma")  # their pipelines take packed latents
    arguments = CALLS.get(name, OTHERS)
    call = called(folder.path, size, family.reference_latents(latents) if packs else latents, **arguments)
    guidance = arguments["guidance_scale"] if family.takes_guidance else None
    with torch.no_grad():
        (condition,) = family.encode_conditions(folder, [PROMPT if family.takes_prompt else LABEL], guidance)
    stride = space.stride * family.patch_size
    grid = (size[0] // stride, size[1] // stride)
    first, *_ = call.given
    ours = {
        first: family.reference_latents(latents),
        **family.reference_inputs(condition, call.timestep, size, grid, 1),
    }
    if not family.takes_prompt:
        ours[first] = call.given[first]
    for key, value in call.given.items():
        if key not in ours:
            assert key in UNREAD, f"the pipeline gives {key}"
            assert not value
    expected, actual = dict(pieces(call.given)), dict(pieces(ours))
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        theirs = tensor.reshape(actual[key].shape) if key.endswith("_ids") else tensor  # with a batch or not
        torch.testing.assert_close(actual[key].to(tensor.dtype), theirs, rtol=1e-6, atol=1e-6, msg=key)

    shift, scale = space.shift_and_scale(call.vae)
    x_0 = (functional.pixel_unshuffle(call.decoded, space.patch) - shift) * scale
    after = dict(pieces(family.reference_latents(x_0)))
    packed = call.latents.ndim == 3
    stepped = dict(pieces(call.latents if packed else family.reference_latents(call.latents)))
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, stepped[key].reshape(tensor.shape), rtol=1e-4, atol=1e-4)
