"""`ditf serve` under load, on the loopback: batching, the cache, memory over 10,000 requests, overload.

One picture is looked for in many others (`correspond`, 16 points), by clients that wait for each answer
before they ask again. Every answer is checked against the runtime's own, computed beforehand. Servers are
processes of their own and take turns; the clients are threads of this one, on the same machine. Everything
ends by itself.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 1
FRAMES = 96
SIZE = (120, 160)
CLIENTS = 16
TOLERANCE = 2e-3  # of a cosine: float16 features round otherwise in batches of another size

ONE, BATCHES = ["--max-batch", "1", "--batch-delay", "0"], ["--max-batch", "8"]
MODES = {
    "one at a time": [*ONE, "--cache", "0"],
    "one at a time, cache": [*ONE, "--cache", "2"],
    "dynamic batches": [*BATCHES, "--cache", "0"],
    "dynamic batches, cache": [*BATCHES, "--cache", "2"],
    "all pictures in the cache": [*BATCHES, "--cache", "64"],
}
"""2 MiB hold 56 of the 97 pictures: the one in every request stays cached, the others are evicted unused."""


@dataclass
class Expected:
    """One request: its body, and the runtime's own answer."""

    body: bytes
    header: int
    points: np.ndarray
    scores: np.ndarray
    heat: list[np.ndarray]

    def right(self, points: np.ndarray, scores: np.ndarray) -> bool:
        """Whether an answer has the same cosines, at the same pixels or at ones of equal cosine."""
        if points.shape != self.points.shape or not np.allclose(scores, self.scores, atol=TOLERANCE):
            return False
        return all(
            heat[int(y), int(x)] >= best - TOLERANCE
            for heat, (x, y), best in zip(self.heat, points, self.scores, strict=True)
        )


@dataclass
class Outcome:
    """Seconds of the answers by status, and the number of wrong answers."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    wrong: int = 0
    wall: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Per status: answers, p50 and p99 in ms; requests a second of those answered 200."""
        quantiles = {
            str(status): {
                "answers": len(values),
                "p50_ms": 1e3 * float(np.quantile(values, 0.5)),
                "p99_ms": 1e3 * float(np.quantile(values, 0.99)),
            }
            for status, values in sorted(self.seconds.items())
        }
        rate = len(self.seconds.get(200, [])) / self.wall
        return {"status": quantiles, "per_second": rate, "wrong": self.wrong, "wall_seconds": self.wall}


class Server:
    """A process of `ditf serve`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def metrics(self) -> dict[str, float]:
        """Read /metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def main() -> None:
    """Measure, and write the result."""
    from harness import Bench, in_child, say, workplace

    bench = Bench(__doc__, THREADS)
    bench.parser.add_argument("--requests", type=int, default=288, help="of a mode in a round")
    bench.parser.add_argument("--rounds", type=int, default=3)
    bench.parser.add_argument("--steady", type=int, default=10_000, help="requests for memory")
    bench.parser.add_argument("--overload-seconds", type=float, default=10.0)
    arguments = bench.parse(requests=16, rounds=1, steady=40, overload_seconds=0.5)
    bench.start()
    modes = dict(list(MODES.items())[-1:]) if bench.smoke else MODES
    with workplace() as folder:
        bundle = folder / "demo"
        in_child(export, bundle)
        expected = expectations(bundle, 4 if bench.smoke else FRAMES)
        rounds: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
        for number in range(arguments.rounds):
            for mode, options in modes.items():
                say(f"round {number + 1} of {arguments.rounds}: {mode}")
                with serving(bundle, *options) as server:
                    ask(server, expected, CLIENTS, len(expected))
                    before = server.metrics()
                    found = ask(server, expected, CLIENTS, arguments.requests).summary()
                    after = server.metrics()
                calls = after["ditf_batch_images_count"] - before["ditf_batch_images_count"]
                images = after["ditf_batch_images_sum"] - before["ditf_batch_images_sum"]
                found["images_per_call"] = images / calls if calls else None
                rounds[mode].append(found)
        say(f"{arguments.steady} requests")
        with serving(bundle, *MODES["dynamic batches, cache"]) as server:
            steady = steady_memory(server, expected, arguments.steady)
        say("overload")
        with serving(bundle, *MODES["dynamic batches"], "--queue", "16") as server:
            overload = shed(server, expected, arguments.overload_seconds)
    result = {"rounds": rounds, "steady": steady, "overload": overload, "clients": CLIENTS, "frames": FRAMES}
    rows = table_of(result)
    bench.write("serve", result, rows, {("serving.md", "serve"): rows})


def export(bundle: Path) -> None:
    """Export the demo model."""
    from ditf.export.exporter import export_bundle
    from ditf.export.planning.export_options import ExportOptions

    export_bundle(ExportOptions(layer="9", precision="float16", batch="dynamic", output=bundle))


def table_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Make the table."""
    from ditf.cli.support.output import bytes_text

    rounds, steady, overload = result["rounds"], result["steady"], result["overload"]
    rows = [("", "requests a second", "p50", "p99", "images a call", "wrong answers")]
    for mode, several in rounds.items():
        ok = [one["status"]["200"] for one in several]
        rows.append(
            (
                f"{mode}, {CLIENTS} clients",
                f"{median(several, 'per_second'):.1f}",
                f"{median(ok, 'p50_ms'):.0f} ms",
                f"{median(ok, 'p99_ms'):.0f} ms",
                f"{median(several, 'images_per_call'):.1f}" if several[0]["images_per_call"] else "",
                f"{sum(one['wrong'] for one in several)}",
            )
        )
    shedding = overload["during"]["status"]
    rows += [
        (
            f"{steady['requests']:,} requests: resident {bytes_text(steady['first_bytes'])} after a tenth,"
            f" {bytes_text(steady['last_bytes'])} at the end",
            f"{steady['per_second']:.1f}", "", f"{steady['p99_ms']:.0f} ms", "", f"{steady['wrong']}",
        ),
        (
            f"200 clients, a queue of 16: {shedding['200']['answers']} answered",
            f"{overload['during']['per_second']:.1f}",
            f"{shedding['200']['p50_ms']:.0f} ms", f"{shedding['200']['p99_ms']:.0f} ms", "",
            f"{overload['during']['wrong']}",
        ),
        (
            f"the same: {shedding['503']['answers']:,} refused with 503", "",
            f"{shedding['503']['p50_ms']:.0f} ms", f"{shedding['503']['p99_ms']:.0f} ms", "", "",
        ),
        (
            f"afterwards, {CLIENTS} clients: {overload['after']['status']['200']['answers']} answered",
            f"{overload['after']['per_second']:.1f}", "",
            f"{overload['after']['status']['200']['p99_ms']:.0f} ms", "", f"{overload['after']['wrong']}",
        ),
    ]  # fmt: skip
    return rows


def median(entries: Sequence[dict[str, Any]], key: str) -> float:
    """The median of a figure over rounds."""
    return statistics.median(one[key] for one in entries)


def expectations(bundle: Path, count: int) -> list[Expected]:
    """A request for each frame, and the runtime's own answer."""
    import tritonclient.http as triton

    import ditf
    from ditf.calib.images import procedural_images

    template, *frames = procedural_images(SIZE, count + 1)
    height, width = SIZE
    points = np.random.default_rng(0).integers(0, (width, height), (16, 2)).astype(np.float32)
    expected = []
    with ditf.load(bundle) as model:
        source = model.features(template)
        for frame in frames:
            target = model.features(frame)
            found = model.match(source, target, points)
            inputs = [
                triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)
                for name, array, datatype in (
                    ("source", template, "UINT8"), ("target", frame, "UINT8"), ("points", points, "FP32"),
                )
            ]  # fmt: skip
            outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in ("matches", "scores")]
            body, header = triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
            heat = [model.heat_map(source, target, point) for point in points]
            expected.append(Expected(body, header, found.points, found.scores, heat))
    return expected


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """Run a server on a free port, and end it by SIGTERM; it must exit with 0."""
    command = [sys.executable, "-m", "ditf", "serve", str(bundle), "--port", "0", "-q", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            yield Server(process, int(url.rpartition(":")[2]))
            process.terminate()
            if process.wait(60) != 0:
                log.seek(0)
                raise RuntimeError(f"the server ended with {process.returncode}: {log.read()[-2000:]!r}")
        finally:
            process.kill()
            process.communicate()


def ask(
    server: Server,
    expected: Sequence[Expected],
    clients: int,
    requests: int | None = None,
    seconds: float = 600.0,
) -> Outcome:
    """Send requests over several connections at once, `requests` in all or for `seconds`."""
    outcome = Outcome()
    lock = threading.Lock()
    numbers = iter(range(requests)) if requests is not None else iter(range(1 << 40))
    begin = threading.Barrier(clients + 1)
    end = [time.monotonic() + seconds]

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        begin.wait(60)
        while time.monotonic() < end[0]:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            one = expected[number % len(expected)]
            start = time.perf_counter()
            status, points, scores = request(connection, one)
            took = time.perf_counter() - start
            wrong = status == 200 and not one.right(points, scores)
            with lock:
                outcome.seconds.setdefault(status, []).append(took)
                outcome.wrong += wrong
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        begin.wait(60)
        start = time.monotonic()
        end[0] = start + seconds
        for one in running:
            one.result()
    outcome.wall = time.monotonic() - start
    return outcome


def request(connection: http.client.HTTPConnection, one: Expected) -> tuple[int, np.ndarray, np.ndarray]:
    """Send one request; returns status, matches and scores."""
    headers = {"Inference-Header-Content-Length": str(one.header)}
    connection.request("POST", "/v2/models/correspond/infer", one.body, headers)
    answer = connection.getresponse()
    content = answer.read()
    nothing = np.zeros(0)
    if answer.status != 200:
        if answer.status == 503 and answer.headers["Retry-After"] is None:
            raise RuntimeError("503 without Retry-After")
        return answer.status, nothing, nothing
    outputs = {entry["name"]: entry for entry in json.loads(content)["outputs"]}
    return 200, *(
        np.array(outputs[name]["data"], np.float32).reshape(outputs[name]["shape"])
        for name in ("matches", "scores")
    )


def steady_memory(server: Server, expected: Sequence[Expected], requests: int) -> dict[str, Any]:
    """Measure resident memory twenty times along the way."""
    step = max(1, requests // 20)
    marks, seconds, wrong, start = [], [], 0, time.monotonic()
    for _ in range(requests // step):
        outcome = ask(server, expected, CLIENTS, step)
        assert set(outcome.seconds) == {200}
        seconds += outcome.seconds[200]
        wrong += outcome.wrong
        marks.append(int(server.metrics()["process_resident_memory_bytes"]))
    return {
        "requests": len(seconds),
        "resident_bytes": marks,
        "first_bytes": marks[1],
        "last_bytes": marks[-1],
        "per_second": len(seconds) / (time.monotonic() - start),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "wrong": wrong,
    }


def shed(server: Server, expected: Sequence[Expected], seconds: float) -> dict[str, Any]:
    """Overload a server with 200 clients that ask again at once; nothing may be left afterwards."""
    resident = [server.metrics()["process_resident_memory_bytes"]]
    during = ask(server, expected, 200, None, seconds).summary()
    after = ask(server, expected, CLIENTS, 10 * CLIENTS).summary()
    metrics = server.metrics()
    resident.append(metrics["process_resident_memory_bytes"])
    left = {name: metrics[f"ditf_{name}"] for name in ("requests_in_flight", "queue_depth", "buffered_bytes")}
    assert not any(left.values()), left
    assert set(after["status"]) == {"200"}, after
    return {"during": during, "after": after, "resident_bytes": resident, "left": left}


if __name__ == "__main__":
    main()
