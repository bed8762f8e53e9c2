"""What an engine's plans are compiled for: batches, shapes, scratch memory and rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ditf.engines.compile import BuildOptions
from ditf.engines.network import Profile
from ditf.runtime.backends.engine_records import IMAGE_SIDES, MATCH_PLAN_POINTS
from ditf.runtime.backends.gpu import Gpu
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.errors import InputError

Profiles = tuple[tuple[int, int, int], ...]
"""(smallest, usual, largest) batch of each optimisation profile."""

_SHARE_OF_SCRATCH = 4  # on a GPU that shares the CPU's memory, a plan gets 1/4 of it


def batch_profiles(bundle: Bundle, batch: Sequence[Sequence[int]]) -> Profiles:
    """The batches of features.plan's profiles.

    Args:
        batch: for a bundle with a dynamic batch: one size; two, for a profile each; or smallest, usual and
            largest.

    Raises:
        InputError: the sizes do not fit the bundle, or are none.
    """
    own = bundle.manifest.batch
    if own != "dynamic":
        if any(set(sizes) != {own} for sizes in batch):
            raise InputError(
                f"--batch does not fit: this bundle's batch is {own}", "export it with --batch dynamic"
            )
        return ((own, own, own),)
    profiles = []
    for sizes in batch or ((1,),):
        twice = len(sizes) == 2 and sizes[0] == sizes[1]
        if twice or list(sizes) != sorted(sizes) or len(sizes) not in (1, 2, 3) or sizes[0] < 1:
            raise InputError(
                f"--batch {','.join(map(str, sizes))} is neither one size, nor two sizes, nor smallest, usual"
                " and largest",
                "for example --batch 1,8 for two profiles, or --batch 1,4,8 for one that takes all sizes",
            )
        if len(sizes) == 2:  # as good as a plan for each, and the weights are there once
            profiles += [(size, size, size) for size in sizes]
        else:
            profiles.append((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    return tuple(profiles)


def features_profiles(bundle: Bundle, batch: Profiles) -> list[Profile]:
    """The optimisation profiles of features.plan; [] if the batch is static."""
    if bundle.manifest.batch != "dynamic":
        return []
    height, width = bundle.manifest.size
    return [
        {"image": ((low, height, width, 3), (usual, height, width, 3), (high, height, width, 3))}
        for low, usual, high in batch
    ]


def match_profile(bundle: Bundle) -> Profile:
    """The optimisation profile of match.plan."""
    h, w = bundle.manifest.grid

    def over(sizes: tuple[int, int, int], cells: int) -> tuple[tuple[int, int], ...]:
        return tuple((size, cells) for size in sizes)

    return {
        "point_rows": over(MATCH_PLAN_POINTS, h),  # type: ignore[dict-item]
        "point_columns": over(MATCH_PLAN_POINTS, w),  # type: ignore[dict-item]
        "rows": over(IMAGE_SIDES, h),  # type: ignore[dict-item]
        "columns": over(IMAGE_SIDES, w),  # type: ignore[dict-item]
    }


def features_options(bundle: Bundle, options: BuildOptions) -> BuildOptions:
    """The options of features.plan."""
    return replace(options, tf32=bundle.may_round(FEATURES))


def advice(bundle: Bundle, sizes: Profiles, trt: Any) -> Iterator[str]:
    """What would make the plans faster, as the builder's log shows (docs/engines.md)."""
    if bundle.manifest.precision == "float32":
        yield f"{trt.__name__} fuses no float32 attention: --precision fp16 is faster on a GPU"
    if any(low == 1 < high for low, _, high in sizes):
        yield (
            "in a profile of its own, one image runs fewer kernels and takes less memory: --batch 1,8 makes a"
            " profile for each of two sizes"
        )


def limit_workspace(options: BuildOptions, gpu: Gpu | None) -> BuildOptions:
    """Limit the scratch memory of a plan on a GPU that shares the CPU's memory, unless the user did.

    TensorRT takes the whole of a GPU's memory as the limit. On a Jetson that is the memory of the machine. A
    kernel that needs most of it works in a build that runs alone, and fails in the robot.
    """
    if gpu is None or not gpu.integrated or options.workspace is not None:
        return options
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(options, workspace=memory // _SHARE_OF_SCRATCH)
