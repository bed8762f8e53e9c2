"""`ditf serve`: serve bundles over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
import shlex
import socket
import stat
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer
from PIL import Image

from ditf.cli.support.bundles import open_bundle
from ditf.cli.support.options import RUNNING, BackendOption, BatchDelayOption, FitOption, verb
from ditf.cli.support.output import show
from ditf.cli.support.state import state
from ditf.runtime import Model
from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.files.reading import open_regular
from ditf.runtime.printable import valid_unicode
from ditf.runtime.serving.limits import CACHE_BYTES, MIB, Batching, Limits

KEY_VARIABLE = "DITF_API_KEY"

_KEY_BYTES = 1 << 16
_CLOSING_S = 5.0  # for an engine's call that still runs when all requests have ended

_log = logging.getLogger("ditf.serve")


@verb(*RUNNING)
def serve(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Directories made by ditf-export.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 stands for all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one and prints it.")
    ] = 8000,
    api_key_file: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE", help=f"File with the key that requests must carry; or set {KEY_VARIABLE}."
        ),
    ] = None,
    batch_delay: BatchDelayOption = Batching.delay_s * 1e3,
    max_batch: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=1024, help="Images in one call, for a bundle with --batch dynamic."
        ),
    ] = Batching.images,
    queue: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=100_000, help="Requests accepted at once; more are answered 503."
        ),
    ] = Limits.requests,
    deadline: Annotated[
        float, typer.Option(metavar="S", min=0.001, help="Requests that wait longer are answered 504.")
    ] = Limits.deadline_s,
    max_body: Annotated[
        float, typer.Option(metavar="MIB", min=0.001, help="Largest body of one request.")
    ] = Limits.body_bytes / MIB,
    max_pixels: Annotated[
        float, typer.Option(metavar="MPX", min=0.001, help="Largest image, in millions of pixels.")
    ] = Limits.pixels / 1e6,
    cache: Annotated[
        float,
        typer.Option(
            metavar="MIB", min=0, help="Memory for features of images seen before; 0 turns the cache off."
        ),
    ] = CACHE_BYTES / MIB,
    drain: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time to finish running requests after SIGTERM.")
    ] = Limits.drain_s,
    log_format: Annotated[
        str,
        typer.Option(
            metavar="auto|json|text",
            help="Format of the log on stderr; auto is text on a terminal, else JSON.",
        ),
    ] = "auto",
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
) -> None:
    """Serve bundles over HTTP: the Open Inference Protocol at /v2, and routes for curl.

    The address is printed when the server is ready. SIGTERM and Ctrl-C let running requests finish.
    """
    try:
        from ditf.runtime.serving.http import logs
        from ditf.runtime.serving.http.app import make_app
        from ditf.runtime.serving.http.descriptors import fit_connections
        from ditf.runtime.serving.http.metrics import ServerMetrics
        from ditf.runtime.serving.http.server import LOOPBACK, Server, bind, url
        from ditf.runtime.serving.service import Service
    except ImportError as error:
        raise missing_extra(error.name or "fastapi", "serve") from None
    if log_format not in logs.FORMATS:
        raise InputError(f"--log-format {log_format!r} is not {', '.join(logs.FORMATS)}")
    limits = fit_connections(
        Limits.for_server(queue, deadline, int(max_body * MIB), int(max_pixels * 1e6), drain)
    )
    key = _api_key(api_key_file)
    names = _names(bundles)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    level = logging.WARNING if state.quiet else logging.INFO
    with bind(host, port) as listening, logs.logging_to_stderr(log_format, level):
        loopback = _is_loopback(listening)
        if not loopback and key is None:
            _log.warning(f"anyone who reaches {host} can use this server; set {KEY_VARIABLE}")
        models: dict[str, Model] = {}
        for name, path in names.items():
            models[name] = model = Model(open_bundle(path), backend, fit, state.device)
            _tell("opened", bundle=str(path), backend=model.detail, reason=model.reason)
        metrics = ServerMetrics()
        service = Service(models, limits, Batching(batch_delay / 1e3, max_batch), int(cache * MIB), metrics)
        try:
            service.warm_up()
            gate = make_app(service, metrics, key, {*LOOPBACK, host} if loopback else None)
            show(url(listening))
            Server(gate, limits).run([listening])
        finally:
            ended = service.close(_CLOSING_S)
        _tell("stopped", engine="closed" if ended else "still in a call")


def _tell(event: str, **fields: str) -> None:
    _log.info(event, extra={"fields": fields})


def _names(bundles: list[Path]) -> dict[str, Path]:
    """Map the name of each bundle's directory to its path.

    Raises:
        InputError: two directories have the same name.
    """
    names: dict[str, Path] = {}
    for path in bundles:
        name = valid_unicode(path.resolve().name)
        if name in names:
            raise InputError(f"{names[name]} and {path} are both called {name}", "rename one")
        names[name] = path
    return names


def _api_key(file: Path | None) -> str | None:
    """Read the key from a file or the environment. A command line would be visible to all users.

    Raises:
        InputError: the file cannot be read or is open to others, or the key does not fit a header.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
        where = KEY_VARIABLE
    else:
        where = str(file)
        key = _read_key(file)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where} holds no key", "use printable ASCII characters without spaces")
    return key


def _read_key(file: Path) -> str:
    try:
        with open_regular(file, _KEY_BYTES) as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if os.name != "nt" and mode & 0o077:
                raise InputError(
                    f"{file} holds the key and others may use it (mode {mode:03o})",
                    f"run: chmod 600 {shlex.quote(str(file))}",
                )
            return opened.read().decode("utf-8").strip()
    except OSError as error:
        raise InputError(f"{file} holds no key ({error.strerror})", "write one line into it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} holds no key ({error})", "write one line into it") from None


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
