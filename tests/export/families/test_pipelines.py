"""What the reference gives the transformer, against what the checkpoint's own diffusers pipeline gives it."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.families import family_of
from tests.checkpoints import SAVE

SIZE = (48, 80)
PROMPT = "a cat, asleep"
LABEL = 7

CALLS = {
    "dit": {"class_labels": [LABEL], "guidance_scale": 1.0},
    "pixart": {"use_resolution_binning": False, "guidance_scale": 1.0},
    # the model card of FLUX.1 [schnell] asks for as many tokens as it was trained with
    "schnell": {"max_sequence_length": 256, "guidance_scale": 3.5},
    "flux": {"guidance_scale": 3.5},
    "zimage": {"guidance_scale": 0.0},
}
"""Arguments of a pipeline beside prompt, size and latents: no second pass for classifier-free guidance."""

PLAIN = {"guidance_scale": 1.0}
UNREAD = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "guidance"}
"""Parameters that may be None, empty or False in a pipeline's call, and change nothing then."""


class _Called(Exception):
    """Raised by a hook with the arguments of the transformer."""


def given_by_pipeline(folder, size, latents, **arguments):
    """The arguments of the transformer's first call, by their names, and the pipeline's timestep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of classes of diffusers that it uses itself
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if folder.name == "tiny-pixart-1024":  # the pipeline knows such a model by its size
        pipeline.transformer.register_to_config(sample_size=128)
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # whose timesteps are not shifted
        arguments["sigmas"] = [0.26]
    seen = {}

    def hook(module, args, kwargs):
        seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _Called

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    accepted = inspect.signature(pipeline.__call__).parameters
    given = {"height": size[0], "width": size[1], "latents": latents, "prompt": PROMPT, **arguments}
    with pytest.raises(_Called):
        pipeline(num_inference_steps=1, **{key: value for key, value in given.items() if key in accepted})
    return seen, float(pipeline.scheduler.timesteps[0])


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
    folder = checkpoint(name)
    family = family_of(Checkpoint(folder, name))
    space = LatentSpace.of(Checkpoint(folder, name), family.latent_channels)
    # DiTPipeline makes square images of the model's own size, and draws the latents itself
    size = SIZE if family.takes_prompt else (family.sample_size * space.stride,) * 2
    latents = torch.randn(1, space.channels, *(side // space.stride for side in size))
    packed = family.reference_latents(latents)
    arguments = CALLS.get(name, CALLS["pixart"] if family.name == "pixart" else PLAIN)
    seen, timestep = given_by_pipeline(folder, size, pipeline_latents(family, latents), **arguments)
    guidance = arguments["guidance_scale"] if family.takes_guidance else None
    subject = PROMPT if family.takes_prompt else LABEL
    with torch.no_grad():
        (condition,) = family.encode_conditions(Checkpoint(folder, name), [subject], guidance)
    stride = space.stride * family.patch_size
    grid = (size[0] // stride, size[1] // stride)
    first, *_ = seen
    ours = {first: packed, **family.reference_inputs(condition, timestep, size, grid, 1)}
    for key, value in seen.items():
        if key not in ours:
            assert key in UNREAD, f"the pipeline gives {key}"
            assert not value
    assert set(ours) <= {*seen, *UNREAD}
    expected = dict(pieces(seen))
    actual = dict(pieces(ours))
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        if key == f".{first}" and not family.takes_prompt:
            continue  # the pipeline's own latents
        mine = actual[key]
        if key.endswith("_ids"):  # a transformer takes positions with and without a batch
            tensor, mine = tensor.reshape(mine.shape), mine
        torch.testing.assert_close(mine.to(tensor.dtype), tensor, rtol=1e-6, atol=1e-6, msg=key)


def pipeline_latents(family, latents):
    """The latents as the argument of the family's pipeline, which packs those of FLUX before that."""
    if family.name in ("flux", "chroma"):
        return family.reference_latents(latents)
    return latents
