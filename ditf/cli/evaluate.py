"""`ditf eval`: measure a bundle's matches on the benchmarks of the field."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer

from ditf.calib.eval.benchmarks import BENCHMARKS, Benchmark
from ditf.calib.eval.correspondence import Report
from ditf.calib.eval.creature_pairs import PAIRS, CreaturePairs
from ditf.calib.eval.datasets.base import Reading, check_images
from ditf.cli.support.bundles import open_bundle, open_model
from ditf.cli.support.eval_pictures import check_pictures, write_pictures
from ditf.cli.support.eval_report import (
    BenchmarkRun,
    Floor,
    comparison,
    comparison_document,
    comparison_table,
    detail_tables,
    document,
    headline_table,
)
from ditf.cli.support.eval_wiring import Wiring
from ditf.cli.support.options import RUNNING, BackendOption, FitOption, JsonOption, verb
from ditf.cli.support.output import say, show, tell, write_json
from ditf.cli.support.paths import check_writable
from ditf.cli.support.progress import stages, steps
from ditf.runtime.errors import GateFailed, InputError
from ditf.runtime.matching.soft_argmax import METHODS, check_method

_LISTED = 20  # problems of the data that are printed at most
_CREATURES = "creatures"


@verb(*RUNNING)
def evaluate_bundle(
    name: Annotated[str, typer.Argument(metavar="BENCHMARK", help=", ".join(BENCHMARKS))],
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Directories made by ditf-export; each gets a row."),
    ],
    data: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="The dataset's folder, as it is distributed.")
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Part of the dataset; test or val by default.")] = None,
    alpha: Annotated[
        Optional[list[float]],
        typer.Option(
            metavar="SHARE", help="PCK threshold, as a share of the object's or image's size; repeat."
        ),
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option(metavar="N", min=1, help="Use only N pairs, drawn with a fixed seed.")
    ] = None,
    count: Annotated[
        Optional[int],
        typer.Option(
            "--pairs",
            min=1,
            max=100_000,
            help="Number of creature pairs within a species, and as many across species.",
        ),
    ] = None,
    prompt: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Name of the condition in a bundle that has several; {category} is filled in.",
        ),
    ] = None,
    compare: Annotated[
        Optional[Path],
        typer.Option(
            metavar="BUNDLE", help="Show the difference from this bundle, with its confidence interval."
        ),
    ] = None,
    minimum: Annotated[
        Optional[list[str]],
        typer.Option("--min-pck", metavar="ALPHA=VALUE", help="Exit 1 if PCK is less; repeat."),
    ] = None,
    pictures: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Draw the worst and the best pairs.")
    ] = None,
    cache: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Keep features in this folder, for later runs.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS), help="Method that matches points; argmax is DiTF's protocol."
        ),
    ] = METHODS[0],
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out items that cannot be read, instead of exit 1.")
    ] = False,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Evaluate bundles on a benchmark by its own protocol and metric (docs/eval.md), such as PCK."""
    benchmark = _benchmark(name, alpha)
    check_method(method)
    if method != METHODS[0] and benchmark.kind != "points":
        raise InputError(f"--method applies to points, and {name} has none", "leave --method out")
    floors = [Floor.parse(text, benchmark) for text in minimum or []]
    paths = [*bundles, *([compare] if compare is not None else [])]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise InputError(f"{path} is named twice", "compare different bundles")
    check_writable(json_file, inputs=(*paths, *([data] if data is not None else [])))
    check_pictures(pictures, inputs=(*paths, *([data] if data is not None else [])))
    _check_cache(cache)
    opened = [open_bundle(path) for path in paths]
    part = _split(benchmark, split)
    reading = _read(benchmark, data, part, count, limit)
    about: dict[str, Any] = {"benchmark": name, "split": part, "method": method, "skipped": reading.lost}
    if reading.problems:
        about["problems"] = [{"problem": text, "pairs": n} for text, n in reading.problems.items()]
        _refuse_problems(reading, skip_missing, json_file, about)
    runs = []
    with stages(len(paths)) as stage:
        for bundle in opened:
            stage(f"{name}: {len(reading.items)} items with {bundle.path}")
            runs.append(_run(benchmark, reading, bundle.path, prompt, cache, method, backend, fit))
    measured, other = runs[: len(bundles)], runs[len(bundles) :]
    show(headline_table(benchmark, runs))
    for one in measured[:1] if len(measured) == 1 else []:
        for text in detail_tables(benchmark, reading, one):
            show("\n" + text)
    entries = [document(benchmark, reading, one) for one in measured]
    about.update(entries[0])
    if len(entries) > 1:
        about["bundles"] = entries
    if other:
        found = [comparison(benchmark, one, other[0]) for one in measured]
        for one, differences in zip(measured, found, strict=True):
            show("\n" + comparison_table(one, other[0], differences))
        compared = [comparison_document(one, other[0], f) for one, f in zip(measured, found, strict=True)]
        about["comparison"] = compared[0] if len(compared) == 1 else compared
    if pictures is not None:
        say(f"drew {write_pictures(pictures, benchmark, reading, measured)} pictures in {pictures}")
    gates = [floor.gate(benchmark, one, len(measured) > 1) for one in measured for floor in floors]
    failed = [gate for gate in gates if not gate["ok"]]
    write_json(json_file, {**about, "gates": gates}, ok=not failed)
    if failed:
        texts = ", ".join(f"{g['name']} {g['value']:.4f} (at least {g['limit']:g})" for g in failed)
        raise GateFailed(f"{name}: {texts}", "see the table for what is off")


def _benchmark(name: str, alphas: Optional[list[float]]) -> Benchmark:
    if name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {name!r}", f"choose {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name].with_alphas(alphas) if alphas else BENCHMARKS[name]


def _split(benchmark: Benchmark, split: Optional[str]) -> str:
    if split is not None and split not in benchmark.splits:
        raise InputError(f"{benchmark.name} has no split {split!r}", f"choose {', '.join(benchmark.splits)}")
    return split or benchmark.splits[0]


def _read(
    benchmark: Benchmark, data: Optional[Path], split: str, count: Optional[int], limit: Optional[int]
) -> Reading:
    """Read the items and decode every image once; problems are kept beside the items that can be used."""
    if benchmark.needs_data and data is None:
        raise InputError(f"{benchmark.name} needs its data", "give --data DIR; docs/eval.md has the layout")
    if not benchmark.needs_data and data is not None:
        raise InputError(f"{benchmark.name} needs no data", "leave --data out")
    if benchmark.name == _CREATURES:
        if limit is not None:
            raise InputError("--limit applies to datasets", "for creatures, give --pairs")
        return Reading(CreaturePairs(PAIRS if count is None else count))
    if count is not None:
        raise InputError("--pairs applies to creatures only", "for other benchmarks, give --limit")
    reading = benchmark.read(data or Path(), split)
    if limit is not None and limit < len(reading.items):
        # The first of one fixed shuffle: a smaller limit takes a part of what a larger one takes.
        chosen = np.sort(np.random.default_rng(0).permutation(len(reading.items))[:limit])
        reading = Reading([reading.items[index] for index in chosen], reading.problems)
    with steps() as step:
        return check_images(reading, lambda done, total: step("reading the images", done, total))


def _refuse_problems(reading: Reading, skip: bool, json_file: Optional[Path], about: dict[str, Any]) -> None:
    """Print what is wrong with the data, and stop unless --skip-missing is given.

    Raises:
        GateFailed: --skip-missing is not given.
        InputError: no item is left.
    """
    for text, count in list(reading.problems.items())[:_LISTED]:
        tell(f"{text}{f' ({count} pairs)' if count > 1 else ''}")
    if len(reading.problems) > _LISTED:
        tell(f"... and {len(reading.problems) - _LISTED} more")
    whole = reading.lost + len(reading.items)
    reasons = len(reading.problems)
    summary = f"{reading.lost} of {whole} items cannot be used, for {reasons} reason{'s' * (reasons != 1)}"
    if not reading.items:
        raise InputError(summary, "is --data the right folder? docs/eval.md has the layout")
    if not skip:
        write_json(json_file, {**about, "gates": []}, ok=False)
        raise GateFailed(summary, "fix the dataset, or give --skip-missing to leave them out")
    say(f"{summary}: left out")


def _check_cache(path: Optional[Path]) -> None:
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is not a directory", "name a folder for --cache")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise InputError(f"{path} cannot be written", "choose another --cache")


def _run(
    benchmark: Benchmark,
    reading: Reading,
    path: Path,
    prompt: Optional[str],
    cache: Optional[Path],
    method: str,
    backend: str,
    fit: str,
) -> BenchmarkRun:
    """Run one bundle over all items."""
    with open_model(open_bundle(path), backend, fit) as model, _progress(path.name) as report:
        wiring = Wiring(model, prompt, cache, method)
        if prompt is not None:
            wiring.check_prompts(item.category for item in reading.items)
        outcomes = wiring.evaluate(benchmark, reading, report)
        if cache is not None:
            say(f"features: {wiring.store.computed} computed, {wiring.store.read} read from {cache}")
        return BenchmarkRun(path, model.manifest, model.detail, outcomes)


@contextmanager
def _progress(label: str) -> Iterator[Report]:
    """A bar on a terminal; in a log, a line at each tenth."""
    if sys.stderr.isatty():
        with steps() as step:
            yield lambda name, done, total: step(f"{label}: {name}", done, total)
        return
    said = [0]

    def plain(name: str, done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > said[0]:
            said[0] = tenth
            say(f"{label}: {done} of {total}, {name}")

    yield plain
