"""What the benchmarks share: where a figure was measured, how sides are timed, where results go.

Nothing here measures ditf. A figure is never written without the machine and the versions beside it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ditf.calib.machine import machine, peak_bytes, resident_bytes  # noqa: F401  (benchmarks take them here)
from ditf.cli.support.output import table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ditf", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "onnxruntime")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def provenance(threads: int) -> dict[str, Any]:
    """Machine, operating system, package versions, date, load and threads of a measurement.

    Args:
        threads: that every measured side was given.
    """
    return {**machine(*PACKAGES), "threads": threads}


def pin_threads(threads: int) -> None:
    """Limit the BLAS and OpenMP pools of the processes that `in_child` starts; not of this one."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def wait_until_idle(minutes: float, load: float = 1.5) -> None:
    """Wait, at most so long, until the machine's load is below `load`: other work spoils a timing."""
    deadline = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] > load and time.monotonic() < deadline:
        time.sleep(5)
    say(f"load {os.getloadavg()[0]:.2f}")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a fresh process: what it returns, and nothing else, stays."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def reset_peak_memory() -> None:
    """Let `peak_bytes` start again from now, memory that was freed before given back first."""
    ctypes.CDLL(None).malloc_trim(0)  # else what follows reuses it, and seems to need less than it does
    Path("/proc/self/clear_refs").write_text("5")


def open_session(path: Path, threads: int) -> Any:
    """A graph in ONNX Runtime on the CPU as the runtime opens it, but with this number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleave(
    sides: Mapping[str, Callable[[int], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time every side `repeats` times, the sides taking turns after one untimed round.

    Args:
        sides: {name: function of the round's number}, each on one thread.

    Returns:
        Seconds of processor time by side, and how far the machine was disturbed. For one thread
        processor time is what the clock shows on an idle machine; on a busy one it leaves the waiting
        out, which the clock does not. `wall_over_cpu` says how much that was: 1.0 is none.
    """
    for run in sides.values():
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    wall = 0.0
    for number in range(1, repeats + 1):
        for name, run in sides.items():
            clock, start = time.perf_counter(), time.process_time()
            run(number)
            seconds[name].append(time.process_time() - start)
            wall += time.perf_counter() - clock
    disturbance = {
        "clock": "processor time of one thread",
        "wall_over_cpu": wall / sum(map(sum, seconds.values())),
        "load_average_1min": os.getloadavg()[0],
    }
    return seconds, disturbance


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and every value."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "all": list(seconds),
    }


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """`slow` / `fast`, round by round: what a whole round shares (a busy machine) cancels."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def write_result(
    name: str, origin: Mapping[str, Any], result: Mapping[str, Any], rows: list[tuple[str, ...]]
) -> Path:
    """Write benchmarks/results/<name>.json and print its table.

    Args:
        origin: from `provenance`, taken before the measurement.
        result: what was measured.
        rows: of the table, the heading first.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"schema": 1, "provenance": origin, **result}, indent=2) + "\n", "utf-8")
    versions = ", ".join(f"{package} {version}" for package, version in origin["versions"].items())
    print(f"\n{origin['cpu']} ({origin['instructions']}), {origin['threads']} of {origin['cores']} cores")
    print(f"{versions}\n{origin['date']}, load {origin['load_average_1min']:.2f}\n")
    print(table(rows))
    print(f"\n{path}")
    return path


def write_table(document: str, name: str, rows: list[tuple[str, ...]]) -> None:
    """Put a table between `<!-- name -->` and `<!-- /name -->` in a document of docs/."""
    path = RESULTS.parent.parent / "docs" / document
    lines = ["| " + " | ".join(cell or " " for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no {start} ... {end}")
    path.write_text("\n".join([before + start, "", *lines, "", end + after]), "utf-8")
