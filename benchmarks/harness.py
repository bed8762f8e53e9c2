"""What the benchmarks share: their options, how sides are timed, where they ran, where results go.

Nothing here measures ditf. A figure is never written without the machine and the versions beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ditf.calib.machine import machine
from ditf.cli.support.output import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ditf", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxscript", "onnxruntime")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


Rows = list[tuple[str, ...]]
"""The rows of a table, the heading first."""

_apart = True  # whether `in_child` starts a process; not with --smoke


class Bench:
    """One run of a benchmark: its options, the machine it ran on, and its result.

    Args:
        description: the script's docstring, whose first line `--help` shows.
        threads: threads of every measured side.
        repeats: rounds that are timed by default, in a script that times sides in turns.
        keeps: whether the script takes --folder, for what takes long to make, and --wait.

    Attributes:
        parser: for the script's own options.
        smoke: whether this is a trial run, which writes nothing.
    """

    def __init__(
        self, description: str | None, threads: int, repeats: int | None = None, keeps: bool = False
    ) -> None:
        self.parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
        self.smoke = False
        self._threads = threads
        self._origin: dict[str, Any] = {}
        self.parser.add_argument("--smoke", action="store_true", help="try the script: a tiny run, not kept")
        if repeats is not None:
            self.parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are timed")
        if keeps:
            self.parser.add_argument(
                "--folder", type=Path, help="keep what is made here, or use what is here"
            )
            self.parser.add_argument(
                "--wait", type=float, default=0, metavar="MINUTES", help="for an idle machine"
            )

    def parse(self, **smoke: Any) -> argparse.Namespace:
        """Read the command line.

        Args:
            smoke: values of options with --smoke.
        """
        global _apart
        arguments = self.parser.parse_args()
        self.smoke = arguments.smoke
        _apart = not self.smoke
        if self.smoke:
            vars(arguments).update({"repeats": 1, **smoke})
        return arguments

    def start(self, **versions: str) -> None:
        """Note the machine, its load, the date and the versions; pin the threads. Measurements come after.

        Args:
            versions: of packages beyond `PACKAGES`.
        """
        pin_threads(self._threads)
        self._origin = {**machine(*PACKAGES), "threads": self._threads}
        self._origin["versions"] |= versions

    def write(
        self,
        name: str,
        result: Mapping[str, Any],
        rows: Rows,
        tables: Mapping[tuple[str, str], Rows] | None = None,
    ) -> None:
        """Print the table and write benchmarks/results/<name>.json and tables of the documents.

        Args:
            result: what was measured.
            rows: the table that is printed.
            tables: {(document in docs/, mark): rows}, as `write_table` puts them.
        """
        origin, path = self._origin, RESULTS / f"{name}.json"
        versions = ", ".join(f"{package} {version}" for package, version in origin["versions"].items())
        print(f"\n{origin['cpu']} ({origin['instructions']}), {origin['threads']} of {origin['cores']} cores")
        print(f"{versions}\n{origin['date']}, load {origin['load_average_1min']:.2f}\n")
        print(table(rows))
        document = json.dumps({"schema": 1, "provenance": origin, **result}, indent=2) + "\n"
        if not self.smoke:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(document, "utf-8")
            print(f"\n{path}")
        for (place, mark), lines in (tables or {}).items():
            write_table(place, mark, lines, keep=not self.smoke)


@contextlib.contextmanager
def workplace(folder: Path | None = None) -> Iterator[Path]:
    """Give the folder, or a temporary one that is removed at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ditf-bench-") as name:
        yield Path(name)


def pin_threads(threads: int) -> None:
    """Limit the BLAS and OpenMP pools of the processes that `in_child` starts, not of this one."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))


def say(line: str) -> None:
    """Print a line of progress on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def wait_until_idle(minutes: float, load: float = 1.5) -> None:
    """Wait at most `minutes` until the machine's load is below `load`, as other work disturbs timings."""
    deadline = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] > load and time.monotonic() < deadline:
        time.sleep(5)
    say(f"load {os.getloadavg()[0]:.2f}")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a fresh process: what it returns, and nothing else, stays.

    With --smoke it is called in this process.
    """
    if not _apart:
        return function(*arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def reset_peak_memory() -> None:
    """Reset `peak_bytes` to the current memory, after freed memory is given back to the system."""
    ctypes.CDLL(None).malloc_trim(0)  # else what follows reuses it, and seems to need less
    Path("/proc/self/clear_refs").write_text("5")


def open_session(path: Path, threads: int, disabled: Sequence[str] = ()) -> Any:
    """A graph in ONNX Runtime on the CPU as the runtime opens it, but with this number of threads.

    Args:
        disabled: graph optimisers that are left out.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def graph_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of its weights beside it."""
    return path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size


def interleave(
    sides: Iterable[str], run: Callable[[str, int], Any], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time every side `repeats` times, the sides taking turns after one untimed round.

    Args:
        run: one side, on one thread; it is given the side's name and the round's number.

    Returns:
        Seconds of processor time by side, and how far the machine was disturbed. For one thread
        processor time is what the clock shows on an idle machine; on a busy one it leaves the waiting
        out, which the clock does not. `wall_over_cpu` says how much that was: 1.0 is none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in seconds:
        run(name, 0)
    wall = 0.0
    for number in range(1, repeats + 1):
        for name in seconds:
            clock, start = time.perf_counter(), time.process_time()
            run(name, number)
            seconds[name].append(time.process_time() - start)
            wall += time.perf_counter() - clock
    disturbance = {
        "clock": "processor time of one thread",
        "wall_over_cpu": wall / sum(map(sum, seconds.values())),
        "load_average_1min": os.getloadavg()[0],
    }
    return seconds, disturbance


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """The median, the extremes and every value."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "all": list(seconds),
    }


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """`slow` / `fast` round by round, so that a disturbance of a whole round cancels."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def write_table(document: str, mark: str, rows: Rows, keep: bool = True) -> None:
    """Put a table between `<!-- mark -->` and `<!-- /mark -->` in a document of docs/.

    Args:
        keep: whether the document is written, or only checked for the marks.
    """
    path = ROOT / "docs" / document
    lines = ["| " + " | ".join(cell or " " for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no {start} ... {end}")
    if keep:
        path.write_text("\n".join([before + start, "", *lines, "", end + after]), "utf-8")
