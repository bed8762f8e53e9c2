"""One request and its answer: the id, the bytes received and sent, and the headers of every answer."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499  # nginx's status for the log, when nobody is left to be answered
_CLOSE = (b"connection", b"close")
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Refused(Exception):
    """The request is refused, with an HTTP status and headers."""

    def __init__(self, status: int, problem: str, **headers: str) -> None:
        super().__init__(problem)
        self.status = status
        self.headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Message, send: Send) -> None:
        self.scope = scope
        self.headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get(b"x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.started = time.monotonic()
        self.status = 0
        self.complete = False
        self.received = self.sent = 0
        self.held = 0
        # A proxy may have ended the body by Content-Length, so that what follows on this connection is from
        # another client. It must not be read (RFC 9112, 6.1).
        self._framed_twice = b"content-length" in self.headers and b"transfer-encoding" in self.headers
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [*_HEADERS, (b"x-request-id", self.id.encode())]
            headers = [*message.get("headers", []), *own]
            if self._framed_twice and _CLOSE not in headers:
                headers.append(_CLOSE)
            message = {**message, "headers": headers}
        else:
            self.sent += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, refusal: Refused) -> None:
        body = json.dumps({"error": str(refusal)}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send(
            {
                "type": "http.response.start",
                "status": refusal.status,
                "headers": [*headers, *refusal.headers],
            }
        )
        await self.send({"type": "http.response.body", "body": body})
