"""Flags of the command line from the declaration of `ExportOptions`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import typer

from ditf.cli.support.state import state
from ditf.export.planning.export_options import ExportOptions, Flag, flags_of
from ditf.runtime.errors import InputError


class ExportFlags:
    """The fields of `ExportOptions` that are flags of one verb."""

    def __init__(self, name: str, takes: Optional[str], helps: Mapping[str, str]) -> None:
        declared = flags_of(ExportOptions)
        self.name = name
        self._flags = {one: declared[one] for one in (takes.split() if takes else declared)}
        self._helps = helps
        self._types = get_type_hints(ExportOptions)
        self._defaults = {one.name: one.default for one in fields(ExportOptions)}

    def parameters(self) -> list[inspect.Parameter]:
        """One parameter, annotated for typer, for each flag."""
        found = []
        for name, flag in self._flags.items():
            for short, value in flag.shorthands.items():
                option = typer.Option(short, help=f"Short for --{_dashed(name)} {value}.")
                found.append(_parameter(short.lstrip("-"), Annotated[bool, option], False))
            found.append(self._flag(name, flag))
        return found

    def _flag(self, name: str, flag: Flag) -> inspect.Parameter:
        kind, default = self._types[name], self._defaults[name]
        if default is True:
            option = typer.Option(f"--no-{_dashed(name)}", help=self._helps.get(name, flag.help))
            return _parameter(f"no_{name}", Annotated[bool, option], False)
        inner = next((one for one in get_args(kind) if one is not type(None)), kind)
        plain = inner if get_origin(kind) is Union else kind
        metavar = flag.metavar
        if get_origin(plain) is Literal and metavar is None:
            metavar = "|".join(get_args(plain))
        if flag.shorthands:
            default = None  # tells --fp16 alone from --fp16 --precision fp32, a contradiction
        if flag.parse is not None or get_origin(plain) is Literal:
            plain, default = str, None if default is None else str(default)
        elif get_origin(plain) is tuple:
            plain, default = list[get_args(plain)[0]], None  # type: ignore[misc]
        names = (f"--{_dashed(name)}", *flag.aliases)
        option = typer.Option(*names, metavar=metavar, help=self._helps.get(name, flag.help))
        return _parameter(name, Annotated[Optional[plain] if default is None else plain, option], default)

    def collect(self, given: dict[str, Any]) -> ExportOptions:
        """Take the flags out of the values of the command line, and make the options of them."""
        values: dict[str, Any] = {"command": state.command}
        for name, flag in self._flags.items():
            if self._defaults[name] is True:
                values[name] = not given.pop(f"no_{name}")
                continue
            text = given.pop(name)
            value = text if text is None or flag.parse is None else flag.parse(text)
            for short, meant in flag.shorthands.items():
                if given.pop(short.lstrip("-")):
                    if text not in (None, meant):
                        raise InputError(
                            f"{short} and --{_dashed(name)} {text} contradict each other", "give one of them"
                        )
                    value = (flag.parse or str)(meant)
            if value is not None:
                values[name] = value
        return ExportOptions(**values)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
