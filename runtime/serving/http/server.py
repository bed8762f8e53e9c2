"""Listening, serving and stopping: uvicorn, which drains when it is told to stop."""

from __future__ import annotations

import math
import os
import socket
import time
from types import FrameType

import uvicorn

from ditf.runtime.errors import InputError
from ditf.runtime.serving.http.connections import Connections, bounded_protocol
from ditf.runtime.serving.http.descriptors import ACCEPTED_AT_ONCE
from ditf.runtime.serving.http.gate import RequestGate
from ditf.runtime.serving.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names that a server on the loopback answers to."""

_BACKLOG = 1024  # connections that wait in the system to be accepted
_CLOSING_S = 2  # for connections that are being written to when draining has ended


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
        InputError: no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:
        number = getattr(error, "errno", None)
        # create_server adds its own words; getaddrinfo's numbers are not the system's.
        reason = os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host}:{port} ({reason})", "choose another --host or --port"
        ) from None


def url(listening: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn that answers what it has let in before it stops.

    On SIGTERM or Ctrl-C it is no longer ready and lets nothing in, and stops when nothing is in flight, or
    after `limits.drain_s`; on a second one at once.
    """

    def __init__(self, gate: RequestGate, limits: Limits) -> None:
        self.connections = Connections(limits)
        super().__init__(
            uvicorn.Config(
                gate,
                http=bounded_protocol(limits, self.connections),
                backlog=ACCEPTED_AT_ONCE,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(limits.head_s),
                timeout_graceful_shutdown=_CLOSING_S,
                proxy_headers=False,
            )
        )
        self._gate = gate
        self._drain = limits.drain_s
        self._stopping: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; uvicorn's would end with the signal's own exit code."""
        if self._stopping is None:
            self._stopping = time.monotonic()
            self._gate.draining = True
        else:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # asyncio's backlog is also what it accepts at once

    async def on_tick(self, counter: int) -> bool:
        if self._stopping is not None:
            late = time.monotonic() - self._stopping > self._drain
            self.should_exit = self.should_exit or late or self._gate.idle
        return await super().on_tick(counter)
