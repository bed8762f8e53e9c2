"""The table of docs/plan.md: what published models cost at their default settings, counted from configs."""

from __future__ import annotations

from provenance import write_table

from ditf.calib.devices import DEVICES
from ditf.export.cost import ATTENTION, GEMMS, VAE, count_cost
from ditf.export.options import ExportOptions
from ditf.export.plan import decide
from ditf.export.published import open_configs

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
TOO_LARGE = "does not fit"


def rows() -> list[tuple[str, ...]]:
    """Header and a row for each model, in float16."""
    found: list[tuple[str, ...]] = [
        ("model", "layer, size", "VAE", "GEMMs", "attention", "weights", "activations", *SHOWN)
    ]
    for model in MODELS:
        options = ExportOptions(model=model, precision="float16")
        with open_configs(model) as checkpoint:
            plan = decide(options, checkpoint)
            cost = count_cost(plan)
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


if __name__ == "__main__":
    write_table("plan.md", "plans", rows())
