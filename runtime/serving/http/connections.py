"""Limits on connections: how many are open, from which addresses and for how long.

uvicorn has no time limits for sending a request's head and for reading an answer, and accepts connections
until no file descriptor is left. asyncio then neither accepts nor closes any connection, even for health
checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import uuid
from collections import Counter
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ditf.runtime.serving.http.gate import HEALTH_ONLY
from ditf.runtime.serving.limits import Limits

logger = logging.getLogger("ditf.serve.connections")


class Connection(Protocol):
    """What `Connections` needs from a connection.

    Attributes:
        address: the client's address, from `client_address`.
        client: the client's (host, port), for the log.
        idle: whether no request is being answered or read past its head.
    """

    address: str
    client: tuple[str, int] | None

    @property
    def idle(self) -> bool: ...

    def abort(self) -> None:
        """Close the connection at once."""


class Connections:
    """The open connections of a server, and which of them make room for new ones.

    At the limit a new connection replaces the longest idle one. When every connection is busy, a few more are
    accepted for health checks alone, so that a full server still reports that it is alive. One address has at
    most `connections_each`, which its own new connections replace in the same way. Loopback addresses are
    exempt from that, because a proxy on this machine uses them for all of its clients.

    Args:
        limits: its `connections`, `connections_each` and `connections_spare` are used.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._order: dict[Connection, None] = {}  # in the order of last use, the oldest first
        self._each: Counter[str] = Counter()
        self._spare: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._order)

    def for_health_only(self, connection: object) -> bool:
        """Whether a connection was accepted beyond the limits."""
        return connection in self._spare

    def opened(self, connection: Connection) -> bool:
        """Count a new connection; False if there is no room, and the caller must close it."""
        address = connection.address
        crowded_address = bool(address) and self._each[address] >= self._limits.connections_each
        if crowded_address or len(self._order) - len(self._spare) >= self._limits.connections:
            of = address if crowded_address else None
            idle = next((one for one in self._order if one.idle and of in (None, one.address)), None)
            if idle is not None:
                logger.warning(
                    "the longest idle connection is closed: too many are open", extra=_client(idle)
                )
                self.closed(idle)
                idle.abort()
            elif len(self._spare) < self._limits.connections_spare:
                self._spare.add(connection)
            else:
                logger.warning("a connection is refused: too many are open", extra=_client(connection))
                return False
        self._order[connection] = None
        self._each[address] += 1
        return True

    def used(self, connection: Connection) -> None:
        """Note that a connection received or answered a request, so that it is the last to be replaced."""
        if connection in self._order:
            del self._order[connection]
            self._order[connection] = None

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection in self._order:
            del self._order[connection]
            self._spare.discard(connection)
            self._each[connection.address] -= 1
            if not self._each[connection.address]:
                del self._each[connection.address]


def _client(connection: Connection) -> dict[str, Any]:
    return {"fields": {"client": connection.client[0] if connection.client else None}}


def client_address(host: str | None) -> str:
    """The address that counts as one client: IPv4, or an IPv6 /64; "" for clients that are not counted."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            network = ipaddress.ip_network((address, 64), strict=False)
            return "" if address.is_loopback else str(network)
        address = address.ipv4_mapped
    return "" if address.is_loopback else str(address)


class _ClientLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # it is generic from Python 3.11 on
    """uvicorn's log of one connection, with the same fields as a line about a request."""

    @property
    def level(self) -> int:
        return self.logger.level


def bounded_protocol(limits: Limits, connections: Connections) -> type[H11Protocol]:
    """Make the class of connections for `uvicorn.Config(http=...)`."""

    class BoundedProtocol(H11Protocol):
        address = ""
        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _request_id = ""

        @property
        def idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            host = self.client[0] if self.client else None
            self.address = client_address(host)
            self._request_id = uuid.uuid4().hex
            fields = {"request_id": self._request_id, "client": host}
            self.logger = _ClientLog(self.logger, {"fields": fields})  # type: ignore[assignment]
            if connections.opened(self):
                self.app_state = {HEALTH_ONLY: connections.for_health_only(self)}
                self._head = self.loop.call_later(limits.head_s, self.abort)
            else:
                self.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self.idle:
                connections.used(self)
            if not self.idle and self._head is not None:
                self._head.cancel()
                self._head = None
            elif self.idle and self._head is None:  # another head has begun, or a refused body continues
                self._head = self.loop.call_later(limits.head_s, self.abort)

        def on_response_complete(self) -> None:
            connections.used(self)
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            """Answer in JSON that the request is not HTTP, with the id that the line in the log has."""
            body = json.dumps({"error": msg}).encode()
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {self._request_id}\r\n\r\n"
            )
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # otherwise an answer has begun
                self.transport.write(head.encode() + body)
            self.conn.send_failed()  # nothing follows
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_s, self.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_stall()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.closed(self)
            self._cancel_stall()
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def abort(self) -> None:
            transport: Any = self.transport
            transport.abort()

        def _cancel_stall(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

    return BoundedProtocol
