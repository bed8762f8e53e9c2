"""Listening, serving and stopping, with a uvicorn server that drains before it stops."""

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
"""The host names that a server on the loopback answers to."""

_BACKLOG = 1024  # connections that wait in the kernel to be accepted
_CLOSING_S = 2  # seconds for connections that are still being written to after draining


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 picks any free port.

    Raises:
        InputError: this machine does not have the address, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:
        number = getattr(error, "errno", None)
        # create_server adds words of its own, and getaddrinfo's numbers are not errno values.
        reason = os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host}:{port} ({reason})", "choose another --host or --port"
        ) from None


def url(listening: socket.socket) -> str:
    """The URL at which a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A uvicorn server that answers the requests it has let in before it stops.

    On SIGTERM or Ctrl-C it reports that it is not ready, lets no more requests in, and stops when none is in
    flight or after `limits.drain_s`. A second signal stops it at once.
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
        """Begin to drain. uvicorn's own handler would end the process with the signal's exit code."""
        if self._stopping is None:
            self._stopping = time.monotonic()
            self._gate.draining = True
        else:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # asyncio's own backlog is also the number that it accepts at once

    async def on_tick(self, counter: int) -> bool:
        if self._stopping is not None:
            late = time.monotonic() - self._stopping > self._drain
            self.should_exit = self.should_exit or late or self._gate.idle
        return await super().on_tick(counter)
