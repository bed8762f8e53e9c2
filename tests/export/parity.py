"""A graph as a module against the checkpoint's own pipeline: whole maps, in the graph's own precision.

The pipeline (`ditf.export.measure.oracle`) is loaded and run by public calls of diffusers. It shares neither
weights, text, noise nor latents with the graph. The images are photographs.

Products of float16 are summed in float32 and rounded once, as on a GPU: PyTorch's own on a CPU are several
times slower. What does not fit float16 overflows in both.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from ditf.calib.parity import feature_parity, worst
from ditf.export.assemble.features_graph import assemble
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.measure.oracle.own_pipeline import OwnPipeline
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.planning.conditions import encode, trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan

SETTINGS = FeatureSettings(channels=(3,))
PROMPTS = ("a cat", "the head of a dog, seen from the left")
LABELS = ("7", "0")


def subjects(family, count):
    """Options that name `count` conditions of a family."""
    return {"prompt": PROMPTS[:count]} if family.takes_prompt else {"class_label": LABELS[:count]}


@lru_cache(maxsize=4)
def expected(folder: Path, layer: str, size, ensemble, count, text_padding=None):
    """What the checkpoint's own pipeline gives on the photograph, for each of `count` conditions."""
    plan = plan_of(folder, layer, size, ensemble, count, "bank", False, text_padding=text_padding)
    oracle = Oracle(plan, own_pipeline(folder, text_padding))
    photo = photographs(plan.size)[:1]
    return [oracle.maps(entry, photo, SETTINGS)[0] for entry in plan.entries]


@lru_cache(maxsize=1)
def own_pipeline(folder: Path, text_padding=None) -> OwnPipeline:
    """A checkpoint's pipeline with all prompts of these tests encoded; it serves every layer and size."""
    plan = plan_of(folder, "0", (64, 64), 1, 2, "bank", False, text_padding=text_padding)
    return OwnPipeline(plan, plan.entries)


@lru_cache
def photographs(size: tuple[int, int]) -> np.ndarray:
    """A cat and an astronaut, uint8 [2, H, W, 3]."""
    photos = (skimage.data.chelsea(), skimage.data.astronaut())
    return np.stack([np.asarray(Image.fromarray(photo).resize(size[::-1])) for photo in photos])


def planned(folder, layer, size, ensemble, count, mode, fp16, **changes):
    """The plan of an export, and its encoded entries."""
    plan = plan_of(folder, layer, size, ensemble, count, mode, fp16, **changes)
    return plan, encoded(plan)


def plan_of(folder, layer, size, ensemble, count, mode, fp16, **changes):
    """The plan of an export."""
    checkpoint = Checkpoint(folder, str(folder))
    options = ExportOptions(
        model=str(folder),
        layer=layer,
        size=size,
        ensemble=ensemble,
        precision="float16" if fp16 else "float32",
        conditioning=mode,
        discard=SETTINGS.channels,
        **subjects(family_named(folder), count),
        **changes,
    )
    return make_plan(options, checkpoint)


_conditions = {}


def encoded(plan):
    """The plan's entries with their conditions; a folder's text encoders run once on the same prompts."""
    asked = tuple((entry.prompt, entry.class_label) for entry in plan.entries)
    key = (plan.checkpoint.path, asked, plan.guidance)
    if key not in _conditions:
        with torch.no_grad():
            entries = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)
        _conditions[key] = [entry.condition for entry in entries]
    found = zip(plan.entries, _conditions[key], strict=True)
    return tuple(replace(entry, condition=dict(condition)) for entry, condition in found)


@lru_cache
def family_named(folder):
    from ditf.export.families import family_of

    return family_of(Checkpoint(folder, str(folder)))


def module_parity(
    folder: Path, layer: str, mode: str, fp16: bool, size=(48, 80), ensemble=1, text_padding=None
):
    """The worst metrics over the conditions of a graph, and the plan."""
    count = 1 if mode == "bake" else 2
    plan, entries = planned(folder, layer, size, ensemble, count, mode, fp16, text_padding=text_padding)
    made = assemble(plan, trim(entries, plan.family, mode == "live"), plan.noise(), SETTINGS)
    image = torch.from_numpy(photographs(size)[:1])
    metrics = []
    references = expected(folder, layer, size, ensemble, 2, text_padding)
    for feeds, reference in zip(made.feeds, references, strict=False):
        with torch.no_grad(), Float32Accumulation():
            actual = made.graph(image, *feeds.values())[0].numpy()
        assert actual.shape == reference.shape
        assert actual.dtype == (np.float16 if fp16 else np.float32)
        metrics.append(feature_parity(actual.transpose(1, 2, 0), reference.transpose(1, 2, 0)))
    return worst(metrics)
