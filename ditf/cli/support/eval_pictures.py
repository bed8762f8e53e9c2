"""The pictures of `ditf eval --pictures`: the worst and the best items."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditf.calib.eval.benchmarks import Benchmark
from ditf.calib.eval.datasets.base import Reading
from ditf.cli.support.eval_report import BenchmarkRun
from ditf.runtime.bundles.staging import PICTURES as INDEX
from ditf.runtime.bundles.staging import check_output, staged
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import json_text

_WORST, _BEST = 8, 4  # pictures of each bundle


def check_pictures(path: Path | None, inputs: Sequence[Path]) -> None:
    """Reject a folder that holds anything but the pictures of an earlier run.

    Raises:
        InputError: the folder holds other files, or is a file.
    """
    if path is None or not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} is not a directory", "name a folder for the pictures")
    if any(path.iterdir()):
        if not (path / INDEX).is_file():
            raise InputError(f"{path} holds something else", "name an empty folder for the pictures")
        check_output(path, inputs, INDEX)


def write_pictures(path: Path, benchmark: Benchmark, reading: Reading, runs: Sequence[BenchmarkRun]) -> int:
    """Draw the worst and the best items of each bundle, the worst first. An earlier run's folder is replaced.

    Returns:
        The number of pictures.
    """
    from ditf.calib.eval.pictures import draw_outcome

    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    listed: list[dict[str, Any]] = []
    with staged(path, INDEX) as temporary:
        for number, run in enumerate(runs):
            folder = temporary / f"{number + 1}-{run.path.name}" if len(runs) > 1 else temporary
            folder.mkdir(exist_ok=True)
            order = sorted(
                range(len(run.outcomes)), key=lambda index: run.outcomes[index].value(benchmark.headline)
            )
            chosen = order if len(order) <= _WORST + _BEST else order[:_WORST] + order[-_BEST:]
            for rank, index in enumerate(chosen):
                item, outcome = reading.items[index], run.outcomes[index]
                value = outcome.value(benchmark.headline)
                name = re.sub(r"[^A-Za-z0-9_-]+", "-", item.name)[:80].strip("-")
                file = folder / f"{rank + 1:02d}-{round(100 * value):03d}-{name}.png"
                draw_outcome(benchmark, item, outcome).save(file)
                listed.append({"file": str(file.relative_to(temporary)), "name": item.name, "value": value})
        (temporary / INDEX).write_text(json_text({"pictures": listed}, indent=1), "utf-8")
    return len(listed)
