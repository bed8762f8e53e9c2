"""An earlier `ditf bench --json`, which a later run is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.calib.latency import Change, Timing, compare
from ditf.cli.support.output import SCHEMA
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

_LARGEST = 16 << 20  # bytes
_SAME = ("cpu", "cores", "gpu", "power_mode")  # what a baseline must share


class Baseline:
    """The --json of an earlier run.

    Raises:
        InputError: the file is missing, or no --json of ditf bench.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            document = read_json(path, _LARGEST)
            self.rows = {name: Timing.from_json(name, row) for name, row in document["rows"].items()}
            self._machine = dict(document["machine"])
            self._backend = document["backend"]
            self._settings = {"points": document["points"], "image_size": document["image_size"]}
            if document["schema"] != SCHEMA or not isinstance(self._backend, str) or not self.rows:
                raise ValueError("another schema, or nothing measured")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file", "make one with ditf bench --json") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is no --json of ditf bench ({error})", "make one with --json"
            ) from error

    def check(self, origin: dict[str, Any], settings: dict[str, Any]) -> None:
        """Reject a baseline from another machine or of other work, whose times cannot be compared."""
        for name, now in settings.items():
            if self._settings[name] != now:
                flag = "--" + name.replace("_", "-")
                then = self._settings[name]
                raise InputError(
                    f"{self._path} was measured with {flag} {then}, this is {now}", f"leave {flag} as it was"
                )
        for name in _SAME:
            if self._machine.get(name) != origin.get(name):
                then, now = self._machine.get(name), origin.get(name)
                raise InputError(
                    f"{self._path} was measured on {name} {then}, this is {now}",
                    "measure a baseline on this machine",
                )

    def check_backend(self, backend: str) -> None:
        if self._backend != backend:
            raise InputError(
                f"{self._path} was measured with {self._backend}, this is {backend}",
                f"use --backend {self._backend}, or measure a new baseline",
            )

    def changes(self, rows: dict[str, Timing]) -> list[Change]:
        return [compare(row, self.rows[name]) for name, row in rows.items() if name in self.rows]
