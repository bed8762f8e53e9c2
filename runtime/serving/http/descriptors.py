"""Making sure that there is a file descriptor for every connection that is accepted.

If accept() fails because no descriptor is left, asyncio logs a traceback for each attempt and answers nobody.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from ditf.runtime.errors import InputError
from ditf.runtime.serving.limits import Limits

ACCEPTED_AT_ONCE = 32
"""Connections that the event loop accepts in one turn. Those that are refused are closed a turn later."""

_OWN = 96  # descriptors for models, libraries, the log and the runtime's own files
_FEWEST = 16  # with fewer connections than this, serving makes no sense


def fit_connections(limits: Limits) -> Limits:
    """Raise the soft limit of open files to what the connections need, or allow fewer connections.

    Raises:
        InputError: the hard limit leaves room for fewer than 16 connections.
    """
    if sys.platform == "win32":
        return limits  # there sockets are not file descriptors
    import resource

    beside = _OWN + limits.connections_spare + 2 * ACCEPTED_AT_ONCE
    wanted = limits.connections + beside
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinity = resource.RLIM_INFINITY
    if soft != infinity and soft < wanted:
        soft = wanted if hard == infinity else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == infinity else soft - beside
    if room < _FEWEST:
        raise InputError(f"a limit of {soft} open files is too low for a server", "run: ulimit -n 1024")
    return replace(limits, connections=min(limits.connections, room))
