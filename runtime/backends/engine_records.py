"""The engines of a bundle: reading engine.json, and choosing the engine that fits this machine.

Nothing here deserialises an engine.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, get_type_hints

from ditf.runtime.backends.flavour import FLAVOURS, PORTABLE, RTX, TARGETS, has_rtx
from ditf.runtime.backends.gpu import Gpu, version_text
from ditf.runtime.bundles.bundle import FEATURES, FEATURES_DATA, MATCH, Bundle
from ditf.runtime.bundles.manifest import conforms
from ditf.runtime.bundles.signing import ANYONE, Trust
from ditf.runtime.bundles.staging import FEATURES_PLAN as FEATURES_PLAN
from ditf.runtime.bundles.staging import MATCH_PLAN as MATCH_PLAN
from ditf.runtime.bundles.staging import RECORD as RECORD
from ditf.runtime.errors import BundleError, NewerSchema
from ditf.runtime.files.hashed import HashedFile
from ditf.runtime.files.reading import read_regular

SCHEMA = 2
ENGINES_FOLDER = "engines"
PLANS = {FEATURES: FEATURES_PLAN, MATCH: MATCH_PLAN}

MATCH_PLAN_POINTS = (1, 16, 16)
IMAGE_SIDES = (1, 640, 2048)
"""The ranges of match.plan as (smallest, usual, largest): points at a time, and rows or columns of the target
image. TensorRT may reserve memory for the largest, which is 1 GB here."""

_BUILD = "build it again: ditf build"
_RECORD_BYTES = 1 << 20  # an engine.json with more bytes is not read
_LONGEST_FIRST = sorted(FLAVOURS, key=len, reverse=True)  # one name begins with the other
_OLDEST_COMPATIBLE = 80  # the oldest GPU that hardware compatibility and portable engines cover


@dataclass(frozen=True)
class EngineRecord:
    """Everything that decides whether an engine fits, and how it was made.

    Attributes:
        key: identifies what it was made from; the name of its directory.
        flavour: "tensorrt" or "tensorrt-rtx".
        version: the version of the library that built it.
        target: the compute capability it was built for, "portable", or "" for the GPU that built it.
        gpu: the GPU that built it, such as "NVIDIA Orin sm_87 8 SMs".
        driver: the newest CUDA version of that GPU's driver; 12060 is 12.6.
        onnx: {file of the bundle: sha256} of the files it was built from.
        batch: the smallest, usual and largest batch of each profile of features.plan.
        options: the options of the build.
        plans: {file: {"bytes": n, "sha256": hex}}.
        left_out: {plan: reason} of the plans that could not be built for the target.
        seconds: how long each plan took to build.
        peak_bytes: the peak memory of the building process.
    """

    schema: int
    key: str
    flavour: str
    version: str
    target: str
    gpu: Optional[str]
    driver: Optional[int]
    onnx: dict[str, str]
    batch: list[list[int]]
    options: dict[str, Any]
    plans: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    seconds: dict[str, float]
    peak_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def stale(self, bundle: Bundle) -> str:
        """The reason why the engine is not of this bundle; "" if it is."""
        for name, digest in sources(bundle).items():
            if self.onnx.get(name) != digest:
                return f"built from another {name}"
        return ""

    def misfit(self, bundle: Bundle, gpu: Gpu, version: str) -> str:
        """The reason why the engine cannot run here; "" if it can.

        Args:
            version: the installed version of its flavour's library.
        """
        stale = self.stale(bundle)
        if stale:
            return stale
        why = self._other_gpu(gpu)
        if why:
            return why
        if self.driver is not None and self.driver > gpu.driver:
            return (
                f"built under a driver of CUDA {version_text(self.driver)}, here it is"
                f" {version_text(gpu.driver)}"
            )
        if self.version != version:
            kept = self.options.get("version_compatible") and _same_major_and_newer(version, self.version)
            if not kept:
                return f"built with {self.flavour} {self.version}, installed is {version}"
        return ""

    def _other_gpu(self, gpu: Gpu) -> str:
        newer = gpu.capability >= _OLDEST_COMPATIBLE
        if self.target == PORTABLE:
            covered = newer and has_rtx(gpu)
            return "" if covered else f"built for {PORTABLE}, which leaves out {gpu.target}"
        if self.target:
            return "" if self.target == gpu.target else f"built for {self.target}, this GPU is {gpu}"
        if self.gpu == str(gpu) or (newer and self.options.get("hardware_compatible")):
            return ""
        return f"built on {self.gpu}, this GPU is {gpu}"

    @property
    def capability(self) -> str:
        """The compute capability that it was built for, such as "sm_87"; or "portable"."""
        words = reversed((self.gpu or "").split())
        return self.target or next((word for word in words if re.fullmatch(r"sm_[0-9]{2,3}", word)), "")

    def plan(self, folder: Path, name: str) -> HashedFile:
        """One of the plans, with the size and hash that this record gives for it."""
        listed = self.plans[name]
        return HashedFile(folder / name, listed["bytes"], listed["sha256"], f"{_BUILD} --force")

    @property
    def host_code(self) -> bool:
        """Whether the plan holds code that runs on the CPU, as a version-compatible plan does."""
        return bool(self.options.get("version_compatible"))

    @property
    def batch_text(self) -> str:
        """The batches for people, such as "1", "1-8" or "1 and 8"."""
        return " and ".join("-".join(map(str, dict.fromkeys((low, high)))) for low, _, high in self.batch)


def sources(bundle: Bundle) -> dict[str, str]:
    """{file: sha256} of the bundle's files that engines are built from."""
    names = (FEATURES, FEATURES_DATA, MATCH)
    return {name: bundle.manifest.files[name]["sha256"] for name in names if name in bundle.manifest.files}


def read_record(folder: Path, trust: Trust = ANYONE) -> EngineRecord:
    """Read and validate the record of an engine.

    Raises:
        BundleError: the record is missing, damaged or of a newer schema, or lacks a required signature.
    """
    content = record_content(folder)
    trust.check(folder / RECORD, content)
    return parse_record(folder, content)


def record_content(folder: Path) -> bytes:
    """Read the bytes of an engine's record.

    Raises:
        BundleError: there is no record, or it cannot be read.
    """
    path = folder / RECORD
    try:
        return read_regular(path, _RECORD_BYTES)
    except FileNotFoundError:
        raise BundleError(f"{folder} has no {RECORD}", _BUILD) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})", _BUILD) from error


def parse_record(folder: Path, content: bytes) -> EngineRecord:
    """Validate the content of an engine's record.

    Raises:
        BundleError: the record is damaged, or of a newer schema.
    """
    path = folder / RECORD
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error})", _BUILD) from error
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise BundleError(f"{path} is no engine record", _BUILD)
    if document["schema"] > SCHEMA:
        raise NewerSchema(
            f"{folder} has schema {document['schema']}, this ditf reads up to {SCHEMA}",
            "run: pip install --upgrade ditf",
        )
    if document["schema"] < SCHEMA:
        raise BundleError(
            f"{folder.name} was built by ditf 0.1.0, whose plans round float32 products to TF32",
            _BUILD,
        )
    hints = get_type_hints(EngineRecord)
    for item in fields(EngineRecord):
        if item.name not in document or not conforms(document[item.name], hints[item.name]):
            raise BundleError(f"{path} has no valid {item.name}", _BUILD)
    record = EngineRecord(**{item.name: document[item.name] for item in fields(EngineRecord)})
    wrong = _contradiction(folder, record)
    if wrong:
        raise BundleError(f"{path} has no valid {wrong}", _BUILD)
    return record


def _contradiction(folder: Path, record: EngineRecord) -> str:
    """The first field with a value that no build writes; "" if there is none."""
    texts = (record.key, record.version, record.target, record.gpu or "", *record.left_out.values())
    valid = {
        "key": record.key == folder.name,
        "flavour": record.flavour in FLAVOURS,
        "version": record.key.startswith(f"{record.flavour}-{record.version}-"),
        "text": all(text.isprintable() for text in texts),
        "target": record.target in ("", PORTABLE, *TARGETS),
        "gpu": bool(record.capability),
        "batch": bool(record.batch)
        and all(len(one) == 3 and 1 <= one[0] <= one[1] <= one[2] for one in record.batch),
        "plans": FEATURES_PLAN in record.plans
        and {*record.plans, *record.left_out} == set(PLANS.values())
        and all(
            conforms(listed.get("bytes"), int) and conforms(listed.get("sha256"), str)
            for listed in record.plans.values()
        ),
    }
    return next((name for name, fine in valid.items() if not fine), "")


def verify_plans(folder: Path, record: EngineRecord, contents: bool = True) -> None:
    """Check an engine's plans against its record, before anything deserialises them.

    Args:
        contents: compare hashes as well as sizes.

    Raises:
        BundleError: a plan is missing, truncated or altered.
    """
    for name in record.plans:
        record.plan(folder, name).check(contents)


def build_command(bundle: Bundle, flavour: str, gpu: Gpu) -> str:
    """The command that builds an engine for a GPU; with TensorRT where TensorRT-RTX has no target."""
    command = f"run: ditf build {bundle.path} --backend"
    if flavour == RTX and has_rtx(gpu):
        older = gpu.capability < _OLDEST_COMPATIBLE
        return f"{command} {RTX}" + (f" --target {gpu.target}" if older else "")
    return f"{command} tensorrt"


def has_engine(bundle: Bundle, flavour: str) -> bool:
    """Whether a bundle has an engine of a flavour, whether it fits this machine or not."""
    return any(_flavour_of(folder) == flavour for folder in engine_folders(bundle.path))


def choose_engine(bundle: Bundle, flavour: str, gpu: Gpu, version: str) -> tuple[Path, EngineRecord]:
    """Choose the engine that runs here.

    Of the engines that fit, those without code for the CPU come first, and then those for exactly this GPU.

    Raises:
        BundleError: no engine fits; the message says what differs, and which command builds one.
    """
    misfits, fitting = [], []
    for folder in engine_folders(bundle.path):
        if _flavour_of(folder) != flavour:
            continue
        try:
            record = read_record(folder, bundle.trust)
        except BundleError as error:
            misfits.append(error.problem)
            continue
        why = record.misfit(bundle, gpu, version)
        if why:
            misfits.append(f"{folder.name} was {why}")
        elif record.host_code and not bundle.trust.host_code:
            misfits.append(f"{folder.name} runs code of its own on the CPU (--allow-host-code accepts it)")
        else:
            fitting.append((record.host_code, record.target == PORTABLE, folder, record))
    if not fitting:
        what = "; ".join(misfits) or "it has none"
        raise BundleError(
            f"{bundle.path} has no {flavour} engine that runs here: {what}",
            build_command(bundle, flavour, gpu),
        )
    *_, folder, record = min(fitting, key=lambda one: one[:3])
    return folder, record


def _flavour_of(folder: Path) -> str | None:
    """The flavour that a directory's name begins with, or None."""
    return next((one for one in _LONGEST_FIRST if folder.name.startswith(f"{one}-")), None)


def _same_major_and_newer(version: str, built: str) -> bool:
    here, there = ([int(part) for part in text.split(".")[:3]] for text in (version, built))
    return here[0] == there[0] and here >= there


def engine_folders(bundle: Path) -> list[Path]:
    """The directories of a bundle's finished engines, sorted by name."""
    try:
        inside = sorted((bundle / ENGINES_FOLDER).iterdir())
    except OSError:  # there are none, or they cannot be read
        return []
    return [path for path in inside if _flavour_of(path) and path.is_dir()]
