"""What the runtime costs to have: import, memory, first match, and memory after thousands of matches.

Against a script that does the same with PyTorch and diffusers: it loads the transformer, hooks block 9, and
matches by upsampling, normalising and multiplying. Both sides are whole processes, taking turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Nothing heavy up here: the measured processes run this file.

THREADS = 1
MATCHES = 2000
POINTS = [(40.0, 50.0), (200.5, 120.25), (300.0, 200.0), (100.0, 220.0)]
SIZE = (240, 320)

IMPORT = """
import time, json
import numpy, PIL.Image
start = time.perf_counter()
import ditf.runtime
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def main() -> None:
    """Measure, and write the result."""
    if sys.argv[1:2] and sys.argv[1] in SIDES:  # a measured process
        print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
    else:
        compare()


def compare() -> None:
    """Run both sides in turns, and write the result."""
    from harness import Bench, say, workplace

    from ditf.cli.support.output import bytes_text
    from ditf.export.checkpoints.loading import quieten_libraries
    from ditf.export.exporter import export_bundle
    from ditf.export.planning.export_options import ExportOptions

    bench = Bench(__doc__, THREADS, repeats=5)
    repeats = bench.parse().repeats
    warm_up = 0 if bench.smoke else 1  # rounds that are not counted
    quieten_libraries()
    bench.start()
    imports = [run("-c", IMPORT)["seconds"] for _ in range(2 * repeats + 1)][1:]
    sides: dict[str, list[dict[str, Any]]] = {"ditf": [], "torch": []}
    with workplace() as folder:
        export_bundle(ExportOptions(layer="9", output=folder / "bundle"))
        for number in range(1 - warm_up, repeats + 1):
            say(f"round {number} of {repeats}")
            for side, found in sides.items():
                found.append(run(__file__, side, str(folder)))
        matches = MATCHES // 100 if bench.smoke else MATCHES
        say(f"{matches} matches")
        steady = run(__file__, "steady", str(folder), str(matches))
    medians = {
        side: {key: statistics.median(one[key] for one in found[warm_up:]) for key in found[0]}
        for side, found in sides.items()
    }
    ours, theirs = medians["ditf"], medians["torch"]
    ratios = {key: theirs[key] / ours[key] for key in ours}
    table: list[tuple[str, ...]] = [
        ("", "ditf on ONNX Runtime", "PyTorch and diffusers", "ratio"),
        *(
            (label, text(ours[key]), text(theirs[key]), f"{ratios[key]:.1f}x")
            for label, key, text in (
                ("process start to first match", "first_match_seconds", lambda v: f"{v:.2f} s"),
                ("resident after it", "resident_bytes", lambda v: bytes_text(int(v))),
                ("largest resident", "peak_bytes", lambda v: bytes_text(int(v))),
            )
        ),
        (
            "import ditf.runtime, beyond numpy and pillow",
            f"{statistics.median(imports) * 1e3:.0f} ms",
            "",
            "",
        ),
        (f"resident, growth over {matches} matches", bytes_text(int(max(0, steady["growth_bytes"]))), "", ""),
    ]
    result = {
        "import_seconds": imports,
        "sides": sides,
        "medians": medians,
        "ratios": ratios,
        "steady": steady,
    }
    bench.write("runtime", result, table)


def run(*arguments: str) -> dict[str, Any]:
    """Run a fresh Python; returns the JSON that it prints."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def since_start() -> float:
    """Seconds since this process started."""
    import os
    import time

    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def images() -> list[Any]:
    """Draw two pictures."""
    from ditf.calib.images import procedural_images

    return procedural_images(SIZE, 2)


def ditf_side(folder: Path) -> dict[str, float]:
    """Match with the runtime, as a robot would."""
    import ditf

    pair = images()
    with ditf.load(folder / "bundle") as model:
        source, target = (model.features(image) for image in pair)
        model.match(source, target, POINTS)
        return costs()


def torch_side(folder: Path) -> dict[str, float]:
    """Match as a user of diffusers would."""
    import numpy as np
    import torch
    from diffusers import DiTTransformer2DModel
    from PIL import Image

    from ditf.export.checkpoints.opening import DEMO_CHECKPOINT
    from ditf.export.families.demo import DEMO_DEFAULTS

    torch.set_num_threads(THREADS)
    model = DiTTransformer2DModel.from_pretrained(DEMO_CHECKPOINT / "transformer", torch_dtype=torch.float32)
    side, cells = model.config.sample_size, model.config.sample_size // model.config.patch_size
    timestep = torch.tensor([DEMO_DEFAULTS.timestep])
    unlabelled = torch.tensor([model.config.num_embeds_ada_norm])
    seen: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    model.transformer_blocks[9].attn1.register_forward_pre_hook(hook, with_kwargs=True)
    maps = []
    with torch.no_grad():
        for array in images():
            resized = np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC)).copy()
            x = torch.from_numpy(resized).permute(2, 0, 1)[None].float() / 127.5 - 1
            model(x, timestep=timestep, class_labels=unlabelled)
            feature = seen.pop()[0].T.reshape(1, -1, cells, cells)
            up = torch.nn.functional.interpolate(feature, SIZE, mode="bilinear")
            maps.append(torch.nn.functional.normalize(up, dim=1)[0])
        x, y = np.rint(np.array(POINTS)).astype(int).T
        torch.einsum("cn,chw->nhw", maps[0][:, y, x], maps[1]).flatten(1).argmax(1)
    return costs()


def costs() -> dict[str, float]:
    """The costs of this process so far."""
    from ditf.calib.machine import peak_bytes, resident_bytes

    return {
        "first_match_seconds": since_start(),
        "resident_bytes": resident_bytes(),
        "peak_bytes": peak_bytes(),
    }


def steady_side(folder: Path, matches: str) -> dict[str, float]:
    """Measure memory before and after many matches; every tenth computes features too."""
    import ditf
    from ditf.calib.machine import resident_bytes

    pair = images()
    with ditf.load(folder / "bundle") as model:
        tracker = model.track(pair[0], POINTS)
        target = model.features(pair[1])
        source = model.features(pair[0])
        marks = []
        count = int(matches)
        for index in range(count):
            if index % 10 == 0:
                tracker.update(pair[index // 10 % 2])
            model.match(source, target, POINTS)
            if index in (count // 10, count - 1):
                marks.append(resident_bytes())
    return {"matches": count, "growth_bytes": marks[1] - marks[0], "resident_bytes": marks[1]}


SIDES = {"ditf": ditf_side, "torch": torch_side, "steady": steady_side}


if __name__ == "__main__":
    main()
