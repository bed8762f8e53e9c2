"""Tables, the --json document and the gates of `ditf eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditf.calib.eval.benchmarks import Benchmark
from ditf.calib.eval.datasets.base import Reading
from ditf.calib.eval.outcomes import (
    Difference,
    Key,
    Metrics,
    Outcome,
    by_category,
    by_keypoint,
    category_mean,
    difference,
    totals,
)
from ditf.cli.support.output import table
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.errors import InputError

_COUNTED = "pairs"


@dataclass(frozen=True)
class BenchmarkRun:
    """A bundle's outcomes on a benchmark, in the order of its items."""

    path: Path
    manifest: Manifest
    backend: str
    outcomes: list[Outcome]

    def groups(self) -> dict[str, list[Outcome]]:
        """Outcomes by the benchmark's setting, the headline's first; without settings there is one group."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.group, []).append(outcome)
        return found

    @property
    def headline(self) -> list[Outcome]:
        """Outcomes of the first group."""
        return next(iter(self.groups().values()))


def headline_table(benchmark: Benchmark, runs: Sequence[BenchmarkRun]) -> str:
    """A table with a row for each bundle and group."""
    several = len(runs) > 1
    head = ["bundle", "layer", "t", "precision"] if several else []
    rows: list[tuple[str, ...]] = []
    for run in runs:
        manifest = run.manifest
        about = [run.path.name, str(manifest.layer), str(manifest.timestep), manifest.precision]
        for group, outcomes in run.groups().items():
            found = totals(outcomes)
            cells = {_label((m, t)): _text(m, v) for m, values in found.items() for t, v in values.items()}
            if len({outcome.category for outcome in outcomes}) > 1:
                metric, threshold = benchmark.headline
                mean = category_mean(outcomes)[metric][threshold]
                cells[f"mean of categories {_label(benchmark.headline)}"] = _text(metric, mean)
            if not rows:
                rows.append((*head, benchmark.name, *cells))
            label = group or _count(len(outcomes), benchmark)
            rows.append((*(about if several else []), label, *cells.values()))
    width = max(map(len, rows))
    return table([(*row, *[""] * (width - len(row))) for row in rows])


def detail_tables(benchmark: Benchmark, reading: Reading, run: BenchmarkRun) -> list[str]:
    """Tables by category, and by keypoint if the benchmark names keypoints."""
    outcomes, found = run.headline, []
    metric, threshold = benchmark.headline
    label = _label(benchmark.headline)
    categories = by_category(outcomes)
    if len(categories) > 1:
        per_image = metric == "pck"
        rows = [("category", _unit(benchmark), label, *(["image " + label] if per_image else []))]
        for name, values in categories.items():
            count = sum(outcome.category == name for outcome in outcomes)
            cells = [_text(metric, values[metric][threshold])]
            if per_image:
                cells.append(_text(metric, values["pck_per_image"][threshold]))
            rows.append((name, str(count), *cells))
        found.append(table(rows))
    if benchmark.named:
        rows = [("keypoint", label)]
        rows += [(n, _text(metric, v)) for n, v in _keypoints(benchmark, reading, outcomes).items()]
        found.append(table(rows))
    return found


def document(benchmark: Benchmark, reading: Reading, run: BenchmarkRun) -> dict[str, Any]:
    """The --json of a run: metrics of the first group, and of every group if there are several."""
    manifest = run.manifest
    groups = run.groups()
    result: dict[str, Any] = {
        "bundle": str(run.path),
        "backend": run.backend,
        "layer": manifest.layer,
        "timestep": manifest.timestep,
        "precision": manifest.precision,
        "size": list(manifest.size),
        **_measured(run.headline),
    }
    if benchmark.named:
        result["by_keypoint"] = _keypoints(benchmark, reading, run.headline)
    if len(groups) > 1:
        result["groups"] = {name: _measured(outcomes) for name, outcomes in groups.items()}
    return result


def _measured(outcomes: list[Outcome]) -> dict[str, Any]:
    categories = by_category(outcomes)
    counts = {name: sum(outcome.category == name for outcome in outcomes) for name in categories}
    measured: dict[str, Any] = {**_plain(totals(outcomes)), _COUNTED: len(outcomes)}
    if len(categories) > 1:
        measured["category_mean"] = _plain(category_mean(outcomes))
        measured["by_category"] = {
            name: {**_plain(values), _COUNTED: counts[name]} for name, values in categories.items()
        }
    return measured


def _plain(metrics: Metrics) -> dict[str, Any]:
    """Replace a metric that has no thresholds by its value."""
    return {name: values.get("", values) for name, values in metrics.items()}


def _keypoints(benchmark: Benchmark, reading: Reading, outcomes: list[Outcome]) -> dict[str, float]:
    names = [item.keypoints for item in reading.items[: len(outcomes)]]  # the first group comes first
    return by_keypoint(outcomes, names, benchmark.headline)


def comparison(
    benchmark: Benchmark, run: BenchmarkRun, other: BenchmarkRun
) -> dict[str, dict[Key, Difference]]:
    """Differences run - other of every metric, by group."""
    others = other.groups()
    return {
        group: {key: difference(outcomes, others[group], key, _unit(benchmark)) for key in outcomes[0].shares}
        for group, outcomes in run.groups().items()
    }


def comparison_table(run: BenchmarkRun, other: BenchmarkRun, found: dict[str, dict[Key, Difference]]) -> str:
    """One row for each metric."""
    rows: list[tuple[str, ...]] = [
        (f"{run.path.name} - {other.path.name}", "one", "other", "difference", "95 % interval", "")
    ]
    for group, differences in found.items():
        one, two = (totals(side.groups()[group]) for side in (run, other))
        for (metric, threshold), diff in differences.items():
            values = (one[metric][threshold], two[metric][threshold])
            interval = f"{_signed(metric, diff.low)} to {_signed(metric, diff.high)}"
            said = "" if diff.certain else "may be chance" if diff.low < diff.high else "the same"
            rows.append(
                (
                    f"{group} {_label((metric, threshold))}".strip(),
                    *(_text(metric, value) for value in values),
                    _signed(metric, diff.value),
                    interval,
                    said,
                )
            )
    return table(rows)


def comparison_document(
    run: BenchmarkRun, other: BenchmarkRun, found: dict[str, dict[Key, Difference]]
) -> dict[str, Any]:
    """The --json of a comparison: differences of the first group, and of every group if there are several."""
    groups: dict[str, Any] = {}
    for group, differences in found.items():
        nested: dict[str, dict[str, Any]] = {}
        for (metric, threshold), diff in differences.items():
            nested.setdefault(metric, {})[threshold] = diff.to_json()
        groups[group] = {name: values.get("", values) for name, values in nested.items()}
    result: dict[str, Any] = {"bundle": str(run.path), "other": str(other.path), "confidence": 0.95}
    result["difference"] = next(iter(groups.values()))
    if len(groups) > 1:
        result["groups"] = groups
    return result


@dataclass(frozen=True)
class Floor:
    """`--min-pck ALPHA=VALUE`: the lowest accepted value of the headline metric at a threshold."""

    threshold: str
    value: float

    @classmethod
    def parse(cls, text: str, benchmark: Benchmark) -> Floor:
        """Parse "ALPHA=VALUE". In hpatches ALPHA is a number of pixels, in davis it is J&F, J or F.

        Raises:
            InputError: the text has another form, or the benchmark does not measure ALPHA.
        """
        name, _, number = text.partition("=")
        try:
            value = float(number)
            threshold = name.strip() if benchmark.kind == "videos" else f"{float(name):g}"
        except ValueError:
            value, threshold = -1.0, ""
        if not 0 <= value <= 1:
            raise InputError(
                f"--min-pck {text} is not ALPHA=VALUE, a fraction from 0 to 1", "for example 0.1=0.6"
            )
        known = {
            "videos": ("J&F", "J", "F"),
            "homographies": ("1", "3", "5"),
        }.get(benchmark.kind, tuple(f"{alpha:g}" for alpha in benchmark.criteria.alphas))
        if threshold not in known:
            raise InputError(
                f"--min-pck {text}: {benchmark.name} measures {', '.join(known)}", "name one of them"
            )
        return cls(threshold, value)

    def gate(self, benchmark: Benchmark, run: BenchmarkRun, several: bool) -> dict[str, Any]:
        """The gate for the --json."""
        metric = benchmark.headline[0]
        value = totals(run.headline)[metric][self.threshold]
        name = f"{metric}@{self.threshold}"
        return {
            "name": f"{run.path.name}: {name}" if several else name,
            "value": value,
            "limit": self.value,
            "ok": value >= self.value,
        }


def _unit(benchmark: Benchmark) -> str:
    return "videos" if benchmark.kind == "videos" else "pairs"


def _count(count: int, benchmark: Benchmark) -> str:
    unit = _unit(benchmark)
    return f"1 {unit.removesuffix('s')}" if count == 1 else f"{count} {unit}"


def _label(key: Key) -> str:
    metric, threshold = key
    return {
        "pck": f"@{threshold}",
        "pck_per_image": f"image @{threshold}",
        "pck_px": f"{threshold} px",
        "epe": "error px",
        "homography_accuracy": f"{threshold} px",
        "homography_found": "found",
    }.get(metric, threshold)


def _text(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric == "epe" else f"{value:.1%}"


def _signed(metric: str, value: float) -> str:
    return f"{value:+.2f}" if metric == "epe" else f"{100 * value:+.2f}"
