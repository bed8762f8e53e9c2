"""The gate: an ASGI middleware for all that does not depend on a request's route.

It handles request ids, the API key, limits of body and time, the number of requests, clients that leave and
draining, and it writes one log line and one measurement for each request. A body is read before the request
counts as let in, so that a slow client only occupies a connection and what it has sent.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from ditf.runtime.serving.errors import Overloaded
from ditf.runtime.serving.http.exchange import CLIENT_LEFT, Exchange, Message, Receive, Refused, Send
from ditf.runtime.serving.http.logs import LOGGER
from ditf.runtime.serving.http.origins import host_name, of_other_site
from ditf.runtime.serving.jobs import Ticket
from ditf.runtime.serving.limits import Limits

App = Callable[[Message, Receive, Send], Awaitable[None]]

TICKET = "ticket"
"""The key in scope["state"] of the `Ticket` of a request with a body."""

HEALTH_ONLY = "health_only"
"""The key in scope["state"] that marks a connection beyond the limit, which is for health checks alone."""

logger = logging.getLogger(LOGGER)


class Watcher(Protocol):
    """Receives measurements of answers and stages."""

    def request(self, endpoint: str, status: int, seconds: float) -> None: ...

    def stage(self, name: str, seconds: float) -> None: ...


class RequestGate:
    """The outermost application.

    Args:
        app: the application that gets the requests that are let in.
        limits: the limits of requests.
        watcher: receives measurements.
        api_key: the key that requests must bear; None lets everyone in.
        health_paths: paths that need no key and are answered however many connections are open.
        open_paths: other paths that need no key.
        hosts: the accepted names in the Host header; None accepts any. A server on the loopback sets them, so
            that no web page reaches it by a name that resolves to the loopback.

    Attributes:
        draining: set it to let no more requests in.
        reading, in_flight: the number of requests whose body is being read, and of those let in.
        buffered: the bytes that requests hold: bodies, inflated bodies and large answers.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        watcher: Watcher,
        api_key: str | None = None,
        health_paths: Collection[str] = (),
        open_paths: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._watcher = watcher
        self._key = None if api_key is None else api_key.encode()
        self._health = frozenset(health_paths)
        self._open = self._health.union(open_paths)
        self._hosts = None if hosts is None else frozenset(hosts)
        self.draining = False
        self.reading = 0
        self.in_flight = 0
        self.buffered = 0

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.reading == self.in_flight == 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        scope.setdefault("state", {})
        try:
            self._check(exchange)
            if scope["method"] in ("GET", "HEAD"):
                await self._app(scope, receive, exchange.send)
            else:
                await self._with_body(exchange, receive)
        except Refused as refusal:
            await exchange.refuse(refusal)
        except Exception:
            logger.exception("a defect", extra={"fields": {"request_id": exchange.id}})
            if exchange.status == 0:
                await exchange.refuse(Refused(500, f"a defect of ditf; the log has it as {exchange.id}"))
        finally:
            self.buffered -= exchange.held
            self._record(exchange)

    def _hold(self, exchange: Exchange, count: int) -> None:
        if self.buffered + count > self._limits.buffered_bytes:
            raise Overloaded("the server is busy", "try again")
        exchange.held += count
        self.buffered += count

    def _check(self, exchange: Exchange) -> None:
        path = exchange.scope["path"]
        if exchange.scope["state"].get(HEALTH_ONLY) and path not in self._health:
            raise Refused(503, "too many connections; try again", retry_after="1", connection="close")
        if path not in self._open and of_other_site(exchange.headers, exchange.scope["scheme"]):
            raise Refused(403, "pages of other sites may not use this server")
        if self._hosts is not None:
            host = exchange.headers.get(b"host", "")
            if host_name(host) not in self._hosts:
                raise Refused(421, f"this server is not {host!r:.80}; ask it by its address")
        if self._key is not None and path not in self._open:
            bearer = exchange.headers.get(b"authorization", "")
            given = exchange.headers.get(b"x-api-key", "")
            if bearer[:7].lower() == "bearer ":
                given = bearer[7:].strip()
            if not hmac.compare_digest(given.encode("latin-1"), self._key):
                raise Refused(
                    401, "an API key is needed: Authorization: Bearer KEY", www_authenticate="Bearer"
                )

    async def _with_body(self, exchange: Exchange, receive: Receive) -> None:
        limits = self._limits
        declared = exchange.headers.get(b"content-length", "")
        if declared.isdigit() and int(declared) > limits.body_bytes:
            raise _too_large(limits)
        self._check_room()
        self.reading += 1
        body: deque[bytes] = deque()
        try:
            await asyncio.wait_for(self._read(exchange, receive, body), limits.body_s)
        except (TimeoutError, asyncio.TimeoutError):  # these are two classes before Python 3.11
            raise Refused(408, f"the body took longer than {limits.body_s:g} s", connection="close") from None
        except Overloaded as error:
            raise Refused(503, str(error), retry_after=str(error.retry_after_s)) from None
        finally:
            self.reading -= 1
        if exchange.status == CLIENT_LEFT:
            return
        self._watcher.stage("read", time.monotonic() - exchange.started)
        self._check_room()
        deadline = time.monotonic() + limits.deadline_s
        ticket = Ticket(exchange.id, deadline, lambda count: self._hold(exchange, count))
        exchange.scope["state"][TICKET] = ticket
        self.in_flight += 1
        try:
            await self._answer(exchange, receive, body, ticket)
        finally:
            self.in_flight -= 1

    def _check_room(self) -> None:
        if self.draining:
            raise Refused(503, "the server is stopping", retry_after="1", connection="close")
        if self.in_flight >= self._limits.requests:
            raise Refused(503, "the server is busy; try again", retry_after="1")

    async def _read(self, exchange: Exchange, receive: Receive, body: deque[bytes]) -> None:
        """Read the whole body, in the pieces in which it arrives."""
        limits = self._limits
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                exchange.status = CLIENT_LEFT
                return
            piece = message.get("body", b"")
            exchange.received += len(piece)
            if exchange.received > limits.body_bytes:
                raise _too_large(limits)
            self._hold(exchange, len(piece))
            body.append(piece)
            if not message.get("more_body", False):
                return

    async def _answer(self, exchange: Exchange, receive: Receive, body: deque[bytes], ticket: Ticket) -> None:
        """Run the application on a body. It is cancelled when the client leaves or the deadline passes."""
        left = asyncio.Event()

        async def replay() -> Message:
            if body:
                await asyncio.sleep(0)  # lets others run between the pieces of a form
                piece = body.popleft()
                return {"type": "http.request", "body": piece, "more_body": bool(body)}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        work = asyncio.ensure_future(self._app(exchange.scope, replay, exchange.send))
        leaving = asyncio.ensure_future(watch())
        try:
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait({work, leaving}, timeout=ticket.seconds_left, return_when=first)
            if not done and exchange.status == 0:
                work.cancel()
                await asyncio.wait({work})
                raise Refused(504, "the request waited past its deadline; try again, or ask for less")
            if not done:  # the answer is being written, which `stall_s` limits
                await asyncio.wait({work, leaving}, return_when=first)
            if not work.done() and not exchange.complete:
                exchange.status = CLIENT_LEFT
                work.cancel()
            await work
        except asyncio.CancelledError:
            if exchange.status != CLIENT_LEFT:  # the server is ending, and the client has not left
                raise
        finally:
            leaving.cancel()
            work.cancel()

    def _record(self, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.started
        endpoint = getattr(exchange.scope.get("endpoint"), "__name__", "none")
        self._watcher.request(endpoint, exchange.status, seconds)
        client = exchange.scope.get("client")
        fields = {
            "request_id": exchange.id,
            "method": exchange.scope["method"][:16],
            "path": exchange.scope["path"][:200],
            "status": exchange.status,
            "ms": round(seconds * 1e3, 1),
            "bytes_in": exchange.received,
            "bytes_out": exchange.sent,
            "client": client[0] if client else None,
        }
        level = logging.ERROR if exchange.status == 500 else logging.INFO
        logger.log(level, "request", extra={"fields": fields})


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the body has more than {limits.body_bytes:,} bytes")
