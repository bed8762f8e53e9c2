"""The limits of a server and their defaults, which `ditf serve` takes from here.

They bound what any client can make the server hold, and how long it can make the server wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ditf.runtime.errors import InputError

MIB = 1 << 20

CACHE_BYTES = 256 * MIB
"""Bytes of features of images seen before."""

SCORES_PER_S = 300_000_000
"""Points times target pixels that one CPU thread matches in a second at the slowest. A request's whole
deadline is therefore enough for `Limits.scores` of them (LOG.md, "What a request may cost")."""

# Where Pillow starts to warn of decompression bombs unless it is told otherwise.
_PILLOW_PIXELS = 89_478_485


@dataclass(frozen=True)
class Batching:
    """How images of several requests are run together.

    Attributes:
        delay_s: how long an image waits for others, in seconds.
        images: the most images in one call of a bundle with a dynamic batch; a static batch has its size.
    """

    delay_s: float = 0.005
    images: int = 8


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        requests: requests whose body has been read and that wait, run or are being answered. Further ones are
            refused.
        images: images that wait for the engine.
        body_bytes: bytes of one request's body, also after decompression.
        json_bytes: bytes of JSON in it.
        buffered_bytes: bytes that all requests hold together: bodies, inflated bodies and large answers.
        pixels, side: pixels of one image, and of its longer side.
        points: points in one request.
        scores: points times target pixels of one request; see `SCORES_PER_S`.
        connections: open connections. A new one beyond them replaces the longest idle one.
        connections_each: connections from one address other than the loopback. The default is twice
            `requests`, so that a proxy on another machine can use all requests that are let in.
        connections_spare: further connections, which are accepted for health checks alone.
        deadline_s: seconds from the end of a request's body to the beginning of its answer.
        head_s, body_s: seconds in which a client must send the head, and the body, of a request.
        stall_s: seconds after which a client that reads none of its answer is cut off.
        drain_s: seconds for the requests in flight when the server is told to stop.

    Raises:
        InputError: `pixels` is more than Pillow decodes without a warning.
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

    @classmethod
    def for_server(
        cls, requests: int, deadline_s: float, body_bytes: int, pixels: int, drain_s: float
    ) -> Limits:
        """The limits of a server whose user chose some; those that depend on them follow."""
        return cls(
            requests=requests,
            images=2 * requests,
            connections_each=2 * requests,
            body_bytes=body_bytes,
            buffered_bytes=max(cls.buffered_bytes, 2 * body_bytes),
            pixels=pixels,
            scores=max(1, int(deadline_s * SCORES_PER_S)),
            deadline_s=deadline_s,
            drain_s=drain_s,
        )
