"""Finding the origin of a request from the Host, Origin and Sec-Fetch-Site headers that browsers send."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() and name else host).lower()


def of_other_site(headers: Mapping[bytes, str], scheme: str) -> bool:
    """Whether a page of another origin sent the request.

    Browsers that send Sec-Fetch-Site have compared the origins themselves, even if a proxy in between changes
    the Host header. Without it, the Origin header must equal the requested scheme, host and port. Other
    clients than browsers send neither header.

    Args:
        headers: the headers by lower-case name.
        scheme: the scheme of the request.
    """
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get(b"origin")
    if origin is None:
        return False
    own = _origin(f"{scheme}://{headers.get(b'host', '')}")
    return own is None or _origin(origin) != own


def _origin(url: str) -> tuple[str, str, int] | None:
    """The scheme, host and port of an origin; None if it lacks them, as "null" does."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    if not parts.hostname or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, port
