"""uvicorn's HTTP/1.1 connection with the two time limits it lacks: for a head, and for reading an answer."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ditf.runtime.serving.limits import Limits


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """The class of connections for `uvicorn.Config(http=...)`."""

    class TimedProtocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head = self.loop.call_later(limits.head_s, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting and self._head is not None:
                self._head.cancel()
                self._head = None
            elif waiting and self._head is None:  # a next head has begun; or a refused body goes on
                self._head = self.loop.call_later(limits.head_s, self._give_up)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_s, self._give_up)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_stall()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_stall()
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def _cancel_stall(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

        def _give_up(self) -> None:
            transport: Any = self.transport
            transport.abort()

    return TimedProtocol
