"""Counts from configs against FlopCounterMode: on real graphs, and on the unmodified diffusers classes."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ditf.calib.images import golden_pair
from ditf.export.assemble.features_graph import assemble
from ditf.export.assemble.parameter_counts import parameter_parts
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import shape_model
from ditf.export.estimate.devices import DEVICES
from ditf.export.estimate.estimate import Estimate
from ditf.export.estimate.op_counter import count_operations
from ditf.export.estimate.published_configs import (
    CONFIGS,
    HUB_IDS,
    open_configs,
    open_vae_configs,
    published_family,
)
from ditf.export.estimate.suggestions import suggest
from ditf.export.estimate.work import (
    ATTENTION,
    EMBEDDERS,
    GEMMS,
    MATCH_IMAGE,
    MATCH_POINTS,
    MATCHING,
    VAE,
)
from ditf.export.exporter import export_bundle
from ditf.export.graph.match import MatchGraph
from ditf.export.planning.conditions import example_condition, trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan, plan_from_configs
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError
from tests.checkpoints import SAVE
from tests.export.parity import SETTINGS, planned


def decided(model="demo", **options):
    with open_configs(model) as checkpoint:
        return plan_from_configs(ExportOptions(model=model, **options), checkpoint)


def counted(model="demo", **options):
    with open_configs(model) as checkpoint:
        return Estimate(plan_from_configs(ExportOptions(model=model, **options), checkpoint))


def flops(call):
    """What torch counts. Its registry lacks the CPU's fused attention: written out, the count is the same."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter


@pytest.mark.parametrize("mode", ["bake", "live"])
@pytest.mark.parametrize("name", sorted(SAVE.keys() - {"untrained"}))
def test_tiny_checkpoints_with_their_weights(checkpoint, name, mode):
    """The graph of an export, run on an image in PyTorch, against what the configs said."""
    plan, entries = planned(checkpoint(name), "3", (48, 80), 2, 1, mode, False)
    entries = trim(entries, plan.family, mode == "live")
    made = assemble(plan, entries, plan.noise(), SETTINGS)
    image = torch.from_numpy(golden_pair(plan.size)[:1])
    counter = flops(lambda: made.graph(image, *made.feeds[0].values()))
    cost = Estimate(plan, entries[0].condition)
    assert cost.operations() == counter.get_total_flops() > 0
    assert cost.parameters == sum(parameter.numel() for parameter in made.graph.parameters())
    assert cost.weight_bytes == sum(
        one["bytes"] for part in parameter_parts(made.graph).values() for one in part.values()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_published_geometries(name):
    layer = None if name == "FLUX.1-dev" else "3"
    with open_configs(name) as checkpoint:
        plan = plan_from_configs(ExportOptions(model=name, layer=layer, precision="float16"), checkpoint)
        cost = Estimate(plan)
        graph, feeds = cost.graph, cost.feeds
        vae = AutoencoderKL.from_config(checkpoint.config("vae")) if name == "SD3 medium" else None
    image = torch.empty((1, *plan.size, 3), dtype=torch.uint8, device="meta")
    assert cost.operations() == flops(lambda: graph(image, *feeds)).get_total_flops()
    if vae is not None:  # the unmodified class
        pixels = torch.empty((1, 3, *plan.size), device="meta")
        vae = vae.to("meta")
        assert cost.operations(VAE) == flops(lambda: vae.encode(pixels)).get_total_flops()


def test_a_swapped_encoder_costs_what_the_unmodified_one_does(vaes):
    """The tests' with its weights, and the published geometry, a ninth of the full one's."""
    options = ExportOptions(model=str(vaes.checkpoint), vae=str(vaes.tiny), layer="2", size=(48, 80))
    plan = make_plan(options, Checkpoint(vaes.checkpoint, options.model))
    tiny = AutoencoderTiny.from_pretrained(vaes.tiny)
    cost = Estimate(plan)
    assert cost.operations(VAE) == flops(lambda: tiny.encode(torch.zeros(1, 3, 48, 80))).get_total_flops()
    for name, vae in (("PixArt-XL/2 512", "madebyollin/taesd"), ("SD3 medium", "madebyollin/taesd3")):
        with open_configs(name) as checkpoint, open_vae_configs(vae) as encoder:
            plan = plan_from_configs(ExportOptions(model=name, vae=vae, layer="3"), checkpoint, encoder)
            model = shape_model("AutoencoderTiny", plan.latents.config())
            pixels = torch.empty((1, 3, *plan.size), device="meta")
            counted_by_torch = flops(lambda: model.encode(pixels)).get_total_flops()  # noqa: B023
            assert Estimate(plan).operations(VAE) == counted_by_torch
    assert counted("SD3 medium", layer="3").operations(VAE) > 9 * counted_by_torch
    with open_configs("PixArt-XL/2 512") as checkpoint, open_vae_configs("madebyollin/taef1") as encoder:
        options = ExportOptions(model="PixArt-XL/2 512", vae="madebyollin/taef1")
        with pytest.raises(InputError, match="16 channels at a stride of 8, the model's own VAE 4 at 8"):
            plan_from_configs(options, checkpoint, encoder)


NOT_IN_A_BLOCK = ("norm1", "norm1_context", "norm", "adaLN_modulation")
"""What the conditioner computes: the AdaLN linears; of PixArt the caption's keys and values too."""


@pytest.mark.parametrize(
    ("name", "index", "path", "also"),
    [
        ("DiT-XL/2 512", 1, "trunk.blocks.1", ()),
        ("PixArt-XL/2 512", 1, "trunk.blocks.1", ("attn2.to_k", "attn2.to_v")),
        ("SD3 medium", 1, "trunk.doubles.1", ()),
        ("SD3.5 medium", 1, "trunk.doubles.1", ()),
        ("FLUX.1-dev", 1, "trunk.doubles.1", ()),
        ("FLUX.1-dev", 19, "trunk.singles.0", ()),
        ("AuraFlow", 1, "trunk.doubles.1", ()),
        ("AuraFlow", 4, "trunk.singles.0", ()),
        ("Z-Image-Turbo", 2, "trunk.blocks.2", ()),
    ],
)
def test_an_inner_block_costs_what_the_unmodified_one_does(name, index, path, also):
    options = ExportOptions(model=name, layer=str(index + 2), size=(256, 256), conditioning="live")
    with open_configs(name) as checkpoint:
        plan = plan_from_configs(options, checkpoint)
        family, condition = plan.family, example_condition(plan.family)
        cost = Estimate(plan, condition)
        graph, feeds = cost.graph, cost.feeds
    image = torch.empty((1, 256, 256, 3), dtype=torch.uint8, device="meta")
    ours = sum(
        product.operations
        for product in count_operations(graph, image, *feeds).products
        if f"{product.path}.".startswith(f"{path}.")
    )
    model = shape_model(family.transformer_class, {**family.config, "sample_size": 32})
    inputs = family.reference_inputs(condition, 10, plan.size, plan.grid, 1)
    latents = family.reference_latents(torch.empty((1, plan.latents.channels, 32, 32)))
    latents, inputs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (latents, inputs))
    counts = flops(lambda: model(latents, **inputs, return_dict=False)).get_flop_counts()
    block = f"{family.transformer_class}.{family.block_name(index)}"
    left_out = sum(
        sum(counts[f"{block}.{part}"].values())
        for part in (*NOT_IN_A_BLOCK, *also)
        if f"{block}.{part}" in counts
    )
    assert ours == sum(counts[block].values()) - left_out > 0


def test_matching_is_counted_as_it_runs():
    plan = decided()
    h, w = plan.grid
    points, (height, width) = 16, MATCH_IMAGE
    shapes = (*((1, plan.family.channels, h, w),) * 2, (points, h), (points, w), (height, h), (width, w))
    counter = flops(lambda: MatchGraph()(*(torch.rand(shape) for shape in shapes)))
    assert counted().operations(MATCHING) == counter.get_total_flops() * MATCH_POINTS // points


def test_the_published_vae_encoder_is_as_counted_in_the_design():
    assert counted("DiT-XL/2 512").operations(VAE) / 1e9 == pytest.approx(1118, rel=2e-3)


class _Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.softmax((query @ key.transpose(-1, -2)).float(), dim=-1).to(query.dtype) @ value


def test_products_by_hand():
    """B H N D = 2 3 5 4, M = 7, float16: two products of 2 B H N M D; the logits are not moved."""
    query, key = torch.empty(2, 3, 5, 4), torch.empty(2, 3, 7, 4)
    tensors = [tensor.to("meta", torch.float16) for tensor in (query, key, key)]
    found = count_operations(_Attention(), *tensors)
    first, second = found.products
    assert first.operations == second.operations == 2 * 2 * 3 * 5 * 7 * 4
    assert first.moved == 2 * (query.numel() + key.numel())
    assert second.moved == 2 * (key.numel() + query.numel())
    assert (first.kind, first.batched) == ("float16", True)


def test_activations_by_hand():
    """Of a chain of three linears of widths 8, 64, 64, 2, float32: the two of 64 live at once."""
    chain = torch.nn.Sequential(
        *(torch.nn.Linear(a, b, device="meta") for a, b in ((8, 64), (64, 64), (64, 2)))
    )
    found = count_operations(chain, torch.empty(10, 8, device="meta"))
    assert found.peak_bytes() == 4 * 10 * (64 + 64)
    assert [product.path for product in found.products] == ["0", "1", "2"]


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_work_grows_as_it_should(ensemble, batch, layer):
    one = counted("demo", layer=str(layer), size=(64, 64))
    many = counted("demo", layer=str(layer), size=(64, 64), ensemble=ensemble, batch=batch)
    for part in (EMBEDDERS, GEMMS, ATTENTION):
        assert many.operations(part) == one.operations(part) * ensemble * batch
    deeper = counted("demo", layer=str(layer + 1), size=(64, 64))
    assert deeper.operations() > one.operations()
    assert deeper.weight_bytes > one.weight_bytes
    assert many.activation_bytes >= one.activation_bytes


@pytest.fixture(scope="module")
def cost():
    return counted("PixArt-XL/2 512", precision="float16")


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_roofline_is_the_larger_of_its_two_sides(device, cost):
    work = sum(w.operations for w in cost.work if w.part != MATCHING)
    assert cost.seconds(device) >= work / (device.float16 * 1e12)
    assert cost.seconds(device) >= cost.weight_bytes / (device.bandwidth * 1e9)
    assert cost.seconds(device) == pytest.approx(
        sum(cost.seconds(device, part) for part in {w.part for w in cost.work} - {MATCHING})
    )
    assert device.float32 < device.float16 < (device.int8 or 1e9)
    assert device.source


def test_int8_is_counted_as_int8():
    half, int8 = (counted("SD3 medium", layer="6", precision=name) for name in ("float16", "int8"))
    assert int8.operations() == half.operations()
    assert int8.weight_bytes / half.weight_bytes == pytest.approx(0.5, abs=0.1)  # the VAE stays
    orin = DEVICES["orin"]
    assert int8.seconds(orin, GEMMS) == pytest.approx(
        half.seconds(orin, GEMMS) / 2, rel=0.02
    )  # all compute-bound
    with pytest.raises(InputError, match="no int8 rate is published for the Jetson AGX Thor"):
        int8.seconds(DEVICES["thor"])


@pytest.mark.parametrize("bundle", ["demo_bundle", "int8_bundle"])
def test_a_bundle_is_as_large_as_was_said(request, bundle):
    manifest = read_manifest(request.getfixturevalue(bundle))
    plan = decided(
        "demo",
        layer=str(manifest.layer),
        precision=manifest.precision,
        size=manifest.size,
    )
    assert sum(file["bytes"] for file in manifest.files.values()) <= Estimate(plan).bundle_bytes
    weights = manifest.files["features.onnx.data"]["bytes"]
    assert Estimate(plan).weight_bytes == pytest.approx(weights, rel=0.05)


def test_no_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    stages = []
    with pytest.raises(InputError, match=r"needs about 19 MB and .* has 0 MB free"):
        export_bundle(ExportOptions(layer="1", size=(64, 64), output=tmp_path / "b"), stages.append)
    assert stages == ["opening demo"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"precision": "float16"}, 0.8),
        ({"batch": 3, "ensemble": 2}, 0.7),
    ],
)
def test_suggestions_fit(options, share):
    options = {"model": "PixArt-XL/2 512", "layer": "2", "size": (256, 256), **options}
    with open_configs(options["model"]) as checkpoint:
        plan = plan_from_configs(ExportOptions(**options), checkpoint)
        memory = int(share * Estimate(plan).memory_bytes)
        found = suggest(plan, memory)
        assert found
    for flags in found:
        words = flags.split()
        changed = dict(zip(words[::2], words[1::2], strict=True))
        again = dict(options)
        again |= {name[2:]: int(changed[name]) for name in ("--ensemble", "--batch") if name in changed}
        if "--size" in changed:
            again["size"] = tuple(map(int, changed["--size"].split("x")))
        if "--layer" in changed:
            again["layer"] = changed["--layer"]
        if "--precision" in changed:
            again["precision"] = "float16"
        assert again != options
        assert counted(**again).memory_bytes <= memory, flags


def test_what_nothing_suggest():
    assert suggest(decided(layer="1", size=(64, 64)), 1000) == []


def test_published_models_by_name_and_hub_id():
    assert set(HUB_IDS) == set(CONFIGS)
    for model in ("FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "flux.1-DEV"):
        with open_configs(model) as checkpoint:
            assert plan_from_configs(ExportOptions(model=model), checkpoint).layer == 28
    assert published_family("FLUX.1-schnell").takes_guidance is False
