"""Every config key of the diffusers classes that an export rebuilds is read, or has a reason why it is not.

A parameter that a new version of diffusers adds fails these tests until somebody decides.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import diffusers
import pytest

from ditf.export.assemble.features_graph import assemble_shapes
from ditf.export.checkpoints import latent_space
from ditf.export.checkpoints.latent_space import PACKED, PLAIN, TINY, LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import full_config
from ditf.export.families import FAMILIES
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs

FINAL = "the final layer is cut"
SHAPES = "the weights' shapes say it"
WEIGHTS = "the weights have the biases, or do not"
TRAINING = "it acts in training only"

TRANSFORMERS = {
    "dit": {
        "out_channels": FINAL,
        "dropout": TRAINING,
        "norm_num_groups": "the blocks have no group norm",
        "attention_bias": WEIGHTS,
    },
    "pixart": {
        "out_channels": FINAL,
        "dropout": TRAINING,
        "norm_num_groups": "the blocks have no group norm",
        "attention_bias": WEIGHTS,
        "cross_attention_dim": SHAPES,
        "num_embeds_ada_norm": "it has no classes",
    },
    "sd3": {"out_channels": FINAL, "caption_projection_dim": SHAPES},
    "flux": {"out_channels": FINAL, "patch_size": FINAL},
    "flux2": {"out_channels": FINAL, "mlp_ratio": SHAPES},
    "auraflow": {"out_channels": FINAL, "caption_projection_dim": SHAPES},
    "lumina2": {
        "out_channels": FINAL,
        "num_kv_heads": SHAPES,
        "multiple_of": SHAPES,
        "ffn_dim_multiplier": SHAPES,
        "scaling_factor": "diffusers does not read it",
    },
    "zimage": {
        "all_patch_size": "the pipeline uses the embedder of patches of 2",
        "all_f_patch_size": "the pipeline uses the embedder of 1 frame",
        "n_kv_heads": "diffusers does not read it",
    },
    "chroma": {"out_channels": FINAL, "patch_size": FINAL},
}
"""Parameters of each transformer that the graph does not depend on."""

DECODER = "the decoder is not used"
MODULE = "the graph contains the encoder that diffusers makes of it"

VAES = {
    PLAIN: {
        "out_channels": DECODER,
        "up_block_types": DECODER,
        "use_post_quant_conv": DECODER,
        "layers_per_block": MODULE,
        "act_fn": MODULE,
        "norm_num_groups": MODULE,
        "mid_block_add_attention": MODULE,
        "use_quant_conv": MODULE,
        "sample_size": "it is the size of tiles, which are off",
        "force_upcast": "the unmodified VAE runs in float32",
    },
    PACKED: {
        "out_channels": DECODER,
        "up_block_types": DECODER,
        "decoder_block_out_channels": DECODER,
        "use_post_quant_conv": DECODER,
        "layers_per_block": MODULE,
        "act_fn": MODULE,
        "norm_num_groups": MODULE,
        "mid_block_add_attention": MODULE,
        "use_quant_conv": MODULE,
        "sample_size": "it is the size of tiles, which are off",
        "batch_norm_eps": "it is read from the VAE that diffusers makes",
        "batch_norm_momentum": TRAINING,
    },
    TINY: {
        "out_channels": DECODER,
        "decoder_block_out_channels": DECODER,
        "num_decoder_blocks": DECODER,
        "upsample_fn": DECODER,
        "upsampling_scaling_factor": DECODER,
        "num_encoder_blocks": MODULE,
        "latent_magnitude": "it is of scale_latents, which no pipeline calls",
        "latent_shift": "it is of scale_latents, which no pipeline calls",
        "force_upcast": "the unmodified VAE runs in float32",
    },
}
"""Parameters of each VAE that LatentSpace does not read."""

PIPELINES = {
    "id2label": "Checkpoint.class_names reads it",
    "is_distilled": "it only turns off classifier-free guidance",
    "image_encoder": "of an IP-Adapter",
    "feature_extractor": "of an IP-Adapter",
}
"""Parameters with defaults of the families' pipelines, which model_index.json may name."""


class Recorded(dict):
    """A config that knows which of its keys were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


def parameters(name):
    """The config keys of a diffusers class."""
    return {
        key
        for key, one in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
        if key != "self" and one.kind is not inspect.Parameter.VAR_KEYWORD
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_key_of_a_transformer_is_read_or_has_a_reason(checkpoint, family):
    name = {"sd3": "sd35"}.get(family.name, family.name)  # SD3.5 has all that SD3 has
    options = ExportOptions(model=str(checkpoint(name)), size=(64, 64), discard="none")
    plan = plan_from_configs(options, Checkpoint(checkpoint(name), name))
    config = Recorded(plan.family.config)
    recorded = family(config)
    assemble_shapes(replace(plan, family=recorded))
    # what a plan reads of it
    _ = recorded.latent_channels, recorded.blocks, recorded.largest_grid, recorded.example_condition()
    if "sample_size" in config:
        _ = recorded.sample_size
    assert parameters(family.transformer_class) - config.read == set(TRANSFORMERS[family.name])


@pytest.mark.parametrize("name", VAES)
def test_every_key_of_a_vae_is_read_or_has_a_reason(checkpoint, vaes, tmp_path, monkeypatch, name):
    folder = {PLAIN: checkpoint("flux") / "vae", PACKED: checkpoint("flux2") / "vae", TINY: vaes.tiny}[name]
    (tmp_path / "vae").symlink_to(folder)
    configs = []

    def recorded(name, config):
        configs.append(Recorded(full_config(name, config)))
        return configs[-1]

    monkeypatch.setattr(latent_space, "full_config", recorded)
    LatentSpace.of(Checkpoint(tmp_path, "x"), 16 if name == PACKED else 4)
    assert parameters(name) - configs[0].read == set(VAES[name])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_setting_of_a_pipeline_has_a_reason(family):
    for name in family.pipelines or ("DiTPipeline",):
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters
        optional = {
            key
            for key, one in signature.items()
            if key != "self" and one.default is not inspect.Parameter.empty
        }
        assert optional <= set(PIPELINES), name
