"""What a server takes of anyone, so that nothing a client does makes it grow or wait without end."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ditf.runtime.errors import InputError

MIB = 1 << 20
_PILLOW_PIXELS = (
    89_478_485  # where Pillow begins to warn of decompression bombs, unless it was told otherwise
)

SCORES_PER_S = 300_000_000
"""Points times pixels of the target that are matched in a second by one CPU thread, at the slowest: the whole
deadline is enough for `Limits.scores` of them (LOG.md, "What a request may cost")."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        requests: with their bodies read: waiting, running or being answered. More are refused.
        images: that wait for the engine.
        body_bytes: of one request, also after decompression; json_bytes: of what of it is JSON.
        buffered_bytes: that all requests hold together: bodies, also inflated ones, and large answers.
        pixels, side: of one image; points: of one request.
        scores: points times pixels of the target; see SCORES_PER_S.
        connections: that are open. A new one beyond them replaces the longest idle one.
        connections_each: of them, from one address that is not the loopback's: twice `requests`, so that a
            proxy on another machine can use all that is let in.
        connections_spare: beyond them, for health checks alone.
        deadline_s: from the body's end to the answer's beginning.
        head_s, body_s: for a client to send the head, or the body, of a request.
        stall_s: for a client that reads none of its answer.
        drain_s: for what is in flight when the server is told to stop.

    Raises:
        InputError: more pixels than Pillow decodes without a warning.
    """

    requests: int = 64
    images: int = 128
    body_bytes: int = 64 * MIB
    json_bytes: int = 16 * MIB
    buffered_bytes: int = 512 * MIB
    pixels: int = 32_000_000
    side: int = 16_384
    points: int = 4096
    scores: int = 30 * SCORES_PER_S
    connections: int = 512
    connections_each: int = 128
    connections_spare: int = 16
    deadline_s: float = 30.0
    head_s: float = 10.0
    body_s: float = 30.0
    stall_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        most = Image.MAX_IMAGE_PIXELS or _PILLOW_PIXELS
        if self.pixels > most:
            raise InputError(
                f"a limit of {self.pixels:,} pixels is more than Pillow's own", f"at most {most:,}"
            )
