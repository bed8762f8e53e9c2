"""Connecting this process to a Ray cluster."""

from __future__ import annotations

import inspect
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ditf.runtime.errors import InputError, missing_extra


@contextmanager
def connected(address: str | None, verbose: bool) -> Iterator[str]:
    """Connect to a Ray cluster while the block runs. A cluster that is started here is stopped at the end.

    Args:
        address: the cluster, as `ray.init` takes it: "auto", "local", "host:port" or "ray://host:10001". None
            stands for RAY_ADDRESS, else a cluster that runs on this machine, else a new one.
        verbose: let Ray write its log to stderr.

    Yields:
        A description of the cluster, for people.

    Raises:
        MissingComponent: Ray is not installed.
        InputError: no cluster answers.
    """
    if not verbose:
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_extra("ray[data]", "ray") from None
    _check_answers(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        place = address or os.environ.get("RAY_ADDRESS", "this machine")
        raise _no_cluster(place, " ".join(str(error).split())) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray sets a handler that ends the process at once
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0))
        yield f"Ray {ray.__version__}, machines: {len(nodes)}, CPUs: {cpus(ray):g}, GPUs: {gpus}"
    finally:
        waits = "wait_for_processes" in inspect.signature(ray.shutdown).parameters  # older versions lack it
        ray.shutdown(**({"wait_for_processes": True} if waits else {}))


def cpus(ray: Any) -> float:
    """The number of CPUs of the connected cluster."""
    return float(ray.cluster_resources().get("CPU", 0))


def _check_answers(address: str | None) -> None:
    """Check that something listens at a cluster's address, because Ray itself would wait for minutes.

    Raises:
        InputError: nothing listens.
    """
    place = (address or os.environ.get("RAY_ADDRESS", "")).removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), 10).close()
    except OSError as error:
        raise _no_cluster(place, str(error.strerror or error)) from error


def _no_cluster(place: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster at {place} ({why[:200]})",
        "start one with ray start --head, or leave --ray-address out",
    )
