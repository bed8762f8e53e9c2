"""Files in the layouts of their authors: diffusers' own single-file loader is the judge."""

from __future__ import annotations

import json
import re

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.formats.original.layout import in_diffusers_names, layout_of
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import check_structure, full_config, model_shapes
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.weights import MetaWeights
from ditf.export.estimate.published_configs import CONFIGS
from ditf.runtime.errors import InputError
from tests.original_layouts import WIDTHS, narrowed, original, original_of

JUDGED = ("flux", "schnell", "chroma", "sd3", "sd35", "sd35-large", "auraflow", "flux2", "lumina2", "zimage")
ALL = (*JUDGED, "pixart", "pixart-1024", "sigma")


@pytest.fixture
def tiny_widths(monkeypatch):
    """diffusers' key maps for the widths of the tiny checkpoints; all else of them stays."""
    for name, widths in WIDTHS.items():
        entry = SINGLE_FILE_LOADABLE_CLASSES[name]
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", narrowed(entry["checkpoint_mapping_fn"], widths))


def class_of(folder):
    return json.loads((folder / "transformer/config.json").read_text())["_class_name"]


def saved(folder, file, prefix="", extra=None):
    """A tiny checkpoint's transformer as an original file."""
    tensors = original_of(folder, class_of(folder))
    named = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**named, **(extra or {})}, file)
    return file


def read(file, base):
    with open_checkpoint(str(file), base=str(base)) as checkpoint:
        return checkpoint.weights("transformer")


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # of diffusers, about its own class
@pytest.mark.usefixtures("tiny_widths")
def test_the_tensors_are_those_of_from_single_file(checkpoint, tmp_path, name):
    folder = checkpoint(name)
    file = saved(folder, tmp_path / "model.safetensors")
    judge = getattr(diffusers, class_of(folder)).from_single_file(
        str(file), config=str(folder / "transformer"), local_files_only=True
    )
    expected = judge.state_dict()
    weights = read(file, folder)
    assert weights.shapes.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(weights.tensor(tensor), value), tensor
        assert weights.bytes_of[tensor] == value.nbytes


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        *((name, "model.diffusion_model.") for name in ALL),
        *(("pixart", prefix) for prefix in ("", "diffusion_model.", "net.")),
    ],
)
@pytest.mark.usefixtures("tiny_widths")
def test_every_prefix_gives_the_checkpoint_back(checkpoint, tmp_path, name, prefix):
    """The names were inverted by hand, and what else a whole checkpoint holds is left out."""
    folder = checkpoint(name)
    others = {"first_stage_model.encoder.conv_in.weight", "text_encoders.t5xxl.transformer.shared.weight"}
    extra = {other: torch.zeros(2) for other in others} if prefix.startswith("model.") else {}
    weights = read(saved(folder, tmp_path / "model.safetensors", prefix, extra), folder)
    own = Checkpoint(folder, str(folder)).weights("transformer")
    assert weights.shapes == own.shapes
    assert weights.dtypes == own.dtypes
    assert all(torch.equal(weights.tensor(tensor), own.tensor(tensor)) for tensor in own.shapes)
    assert weights.fingerprint() == own.fingerprint()


@pytest.mark.parametrize("name", ["flux", "zimage", "pixart", "dit"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_the_names_of_diffusers(checkpoint, tmp_path, name, prefix):
    folder = checkpoint(name)
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({prefix + tensor: value for tensor, value in tensors.items()}, tmp_path / "model.safetensors")
    weights = read(tmp_path / "model.safetensors", folder)
    assert weights.shapes.keys() == tensors.keys()
    assert all(torch.equal(weights.tensor(tensor), value) for tensor, value in tensors.items())


@pytest.mark.parametrize("published", ["FLUX.1-dev", "Chroma1-HD", "Lumina-Image 2.0"])
def test_the_widths_of_published_models_fit_the_key_maps(published):
    """Those of diffusers, with the published widths in their code; shapes only."""
    class_name = CONFIGS[published]["_class_name"]
    config = full_config(class_name, CONFIGS[published])
    shapes = model_shapes(class_name, config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    stored = MetaWeights({name: tuple(one.shape) for name, one in original(class_name, meta).items()})
    assert layout_of(stored.shapes).class_name == class_name
    check_structure(class_name, config, in_diffusers_names(stored, config))


class Counted(SafetensorsWeights):
    """Counts the rows that are read of each stored tensor."""

    def __init__(self, files):
        super().__init__(files)
        self.taken = {}

    def rows(self, name, start, stop):
        self.taken[name] = self.taken.get(name, 0) + stop - start
        return super().rows(name, start, stop)

    def _load(self, name):
        raise AssertionError(f"the whole of {name} is read")


@pytest.mark.usefixtures("tiny_widths")
def test_a_tensor_reads_its_own_rows_only(checkpoint, tmp_path):
    """So that peak memory does not grow with the depth, nor with what is fused."""
    folder = checkpoint("flux")
    stored = Counted([saved(folder, tmp_path / "model.safetensors")])
    weights = in_diffusers_names(stored, {})
    assert not stored.taken
    weights.tensor("single_transformer_blocks.1.attn.to_k.weight")
    assert stored.taken == {"single_blocks.1.linear1.weight": 48}
    for name in weights.shapes:
        weights.tensor(name)
    stored.taken["single_blocks.1.linear1.weight"] -= 48
    assert stored.taken == {name: shape[0] for name, shape in stored.shapes.items()}


@pytest.mark.usefixtures("tiny_widths")
def test_norms_as_newer_versions_of_comfyui_save_them(checkpoint, tmp_path):
    for name in ("flux", "chroma"):
        folder = checkpoint(name)
        tensors = original_of(folder, class_of(folder))
        assert any(tensor.endswith(".scale") for tensor in tensors)
        renamed = {re.sub(r"\.scale$", ".weight", tensor): value for tensor, value in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors")
        weights = read(tmp_path / "model.safetensors", folder)
        assert weights.shapes == Checkpoint(folder, str(folder)).weights("transformer").shapes


def test_another_width_than_the_published_names_the_tensor(checkpoint, tmp_path):
    folder = checkpoint("flux")
    file = saved(folder, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"single_blocks\.0\.linear1\.weight is \[336, 48\], which .*save_pretrained"
    ):
        read(file, folder)


@pytest.mark.usefixtures("tiny_widths")
def test_a_tensor_too_few_or_too_many_is_named(checkpoint, tmp_path):
    folder = checkpoint("flux")
    tensors = original_of(folder, "FluxTransformer2DModel")
    lost = tensors.pop("double_blocks.1.img_mlp.0.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks double_blocks\.1\.img_mlp\.0\.bias of a Flux"):
        read(tmp_path / "model.safetensors", folder)
    more = {**tensors, "double_blocks.1.img_mlp.0.bias": lost, "double_blocks.1.img_mlp.1.bias": lost.clone()}
    save_file(more, tmp_path / "model.safetensors")
    weights = read(tmp_path / "model.safetensors", folder)
    config = full_config("FluxTransformer2DModel", Checkpoint(folder, "").config("transformer"))
    with pytest.raises(InputError, match=r"have double_blocks\.1\.img_mlp\.1\.bias, which"):
        check_structure("FluxTransformer2DModel", config, weights)
