"""Write the tables of docs/plan.md and docs/vae.md: published models, counted from their configs."""

from __future__ import annotations

from dataclasses import replace

from harness import write_table

from ditf.export.estimate.devices import DEVICES
from ditf.export.estimate.estimate import Estimate
from ditf.export.estimate.published_configs import open_configs, open_vae_configs
from ditf.export.estimate.work import ATTENTION, GEMMS, VAE
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs

MODELS = (
    "DiT-XL/2 512",
    "PixArt-XL/2 512",
    "SD3 medium",
    "SD3.5 medium",
    "FLUX.1-dev",
    "AuraFlow",
    "FLUX.2 [klein] 4B",
    "Chroma1-HD",
    "Lumina-Image 2.0",
    "Z-Image-Turbo",
)
SHOWN = ("orin-nano", "orin", "thor", "rtx-4090", "h200")
TINY = {
    "PixArt-XL/2 512": "madebyollin/taesd",
    "SD3 medium": "madebyollin/taesd3",
    "FLUX.1-dev": "madebyollin/taef1",
}
VAE_SHOWN = ("orin", "rtx-4090")
TOO_LARGE = "does not fit"


def rows() -> list[tuple[str, ...]]:
    """Make a header and a row for each model, in float16."""
    found: list[tuple[str, ...]] = [
        ("model", "layer, size", "VAE", "GEMMs", "attention", "weights", "activations", *SHOWN)
    ]
    for model in MODELS:
        options = ExportOptions(model=model, precision="float16")
        with open_configs(model) as checkpoint:
            plan = plan_from_configs(options, checkpoint)
            cost = Estimate(plan)
        work = [f"{cost.operations(part) / 1e12:.2f}" for part in (VAE, GEMMS, ATTENTION)]
        sizes = [f"{size / 1e9:.2f} GB" for size in (cost.weight_bytes, cost.activation_bytes)]
        times = []
        for name in SHOWN:
            fits = cost.memory_bytes <= DEVICES[name].memory_bytes
            milliseconds = 1e3 * cost.seconds(DEVICES[name])
            shown = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
            times.append(f"{shown} ms" if fits else TOO_LARGE)
        where = f"{plan.layer} of {plan.family.blocks.count}, {plan.size[0]} px"
        found.append((model, where, *work, *sizes, *times))
    return found


def vae_rows() -> list[tuple[str, ...]]:
    """Make a header and a row for each model that has a published tiny encoder, in float16."""
    found: list[tuple[str, ...]] = [
        (
            "model",
            "--vae",
            "its own VAE",
            "share of the work",
            "with --vae",
            "share",
            "activations",
            *VAE_SHOWN,
        )
    ]
    for model, vae in TINY.items():
        with open_configs(model) as checkpoint, open_vae_configs(vae) as encoder:
            options = ExportOptions(model=model, precision="float16")
            own = Estimate(plan_from_configs(options, checkpoint))
            tiny = Estimate(plan_from_configs(replace(options, vae=vae), checkpoint, encoder))
        work = []
        for cost in (own, tiny):
            share = cost.operations(VAE) / cost.operations()
            work += [f"{cost.operations(VAE) / 1e9:,.0f} GFLOP", f"{share:.0%}"]
        activations = " to ".join(f"{cost.activation_bytes / 1e9:.2f} GB" for cost in (own, tiny))
        seconds = [[cost.seconds(DEVICES[name]) for cost in (own, tiny)] for name in VAE_SHOWN]
        times = [" to ".join(f"{1e3 * second:.3g} ms" for second in pair) for pair in seconds]
        found.append((model, vae, *work, activations, *times))
    return found


if __name__ == "__main__":
    write_table("plan.md", "plans", rows())
    write_table("vae.md", "counted", vae_rows())
