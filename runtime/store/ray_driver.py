"""Running Ray in a process of its own, and talking to that process.

When Ray's core loses the head of its cluster, it writes a line to stderr and ends its process with exit
code 1. Ray therefore runs in a process of its own (`run_driver`), which reads pickled requests from stdin and
writes one line of JSON for each answer to stdout. That process ends when its stdin closes, however the other
side ended.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

from ditf.runtime.errors import DitfError, MissingComponent, missing_extra
from ditf.runtime.store.extraction import Extraction
from ditf.runtime.store.extraction_ray import ExtractionJob, expected_failure, extract_with_ray
from ditf.runtime.store.ray_connection import connected

_START = "import sys; sys.path[:] = sys.argv[1:]; import ditf.runtime.store.ray_driver as d; d.run_driver()"
_PREFIX = re.compile(r"^\[[^\]]*\] \S+: ")  # the beginning of a line of Ray's log: time, process, place
_PATIENCE = 30.0  # seconds for the cluster to end


class RayCluster:
    """A Ray cluster, connected through another process; `ray_cluster` makes one.

    Attributes:
        detail: a description of the cluster, for people.
    """

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._process = process
        self._said = said
        self.detail = ""

    def connect(self, address: str | None, verbose: bool) -> None:
        self._ask((address, verbose))
        self.detail = str(self._answer()["cluster"])

    def extract(
        self,
        job: ExtractionJob,
        images: Sequence[Path],
        workers: int | None = None,
        progress: Callable[[str], None] = lambda name: None,
    ) -> Extraction:
        """See `extract_with_ray`.

        Raises:
            MissingComponent: the cluster's head was lost; the message quotes Ray.
        """
        self._ask((job, list(images), workers))
        while "done" not in (answer := self._answer()):
            progress(answer["progress"])
        return Extraction(**answer["done"])

    def _ask(self, request: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading the answer raises the reason
            self._process.stdin.write(pickle.dumps(request))
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise MissingComponent(
                f"the head of the Ray cluster was lost ({self._last_words()})",
                "start the cluster again, then run this again: what is stored stays",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise expected_failure(*answer["error"])
        if "defect" in answer:
            raise RuntimeError(answer["defect"])
        return answer

    def _last_words(self) -> str:
        """The last line that Ray wrote, without its time and its place in Ray's source."""
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").split("\n")
        spoken = [_PREFIX.sub("", line).strip() for line in lines if line.strip()]
        if not spoken:
            return f"its process ended with {code}"
        return textwrap.shorten(spoken[-1], 160, placeholder=" ...")


@contextmanager
def ray_cluster(address: str | None, verbose: bool) -> Iterator[RayCluster]:
    """Connect to a Ray cluster while the block runs. A cluster that is started here is stopped at the end.

    Args:
        address: see `connected`.
        verbose: let Ray write its log to stderr.

    Raises:
        MissingComponent: Ray is not installed, or its process ended.
        InputError: no cluster answers.
    """
    try:
        found = find_spec("ray") is not None
    except ValueError:  # the import of ray is blocked
        found = False
    if not found:
        raise missing_extra("ray[data]", "ray")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else said,
            start_new_session=True,  # Ctrl-C only reaches this process, which then closes stdin
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            cluster = RayCluster(process, said)
            cluster.connect(address, verbose)
            yield cluster
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(ProcessLookupError):  # processes that Ray leaves behind when the head is lost
                os.killpg(process.pid, signal.SIGKILL)


def run_driver() -> None:
    """The main function of the process that runs Ray."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps what Ray prints away from the answers
    signal.signal(signal.SIGTERM, _leave)

    def tell(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        address, verbose = pickle.load(sys.stdin.buffer)
        with connected(address, verbose) as cluster:
            tell(cluster=cluster)
            job, images, workers = pickle.load(sys.stdin.buffer)
            threading.Thread(target=_end_with_stdin, daemon=True).start()
            done = extract_with_ray(job, images, workers, lambda name: tell(progress=name))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(done=asdict(done))
    except (EOFError, BrokenPipeError):  # the other process has ended
        pass
    except DitfError as error:
        tell(error=[error.exit_code, error.problem, error.fix])
    except Exception:
        tell(defect=traceback.format_exc())


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
