"""Clients that send too much, too slowly or too many requests at once, and clients that leave."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import logging
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from ditf.runtime.serving.http.gate import RequestGate
from ditf.runtime.serving.http.metrics import ServerMetrics
from ditf.runtime.serving.limits import Batching, Limits
from tests.runtime.serving.pictures import encoded
from tests.runtime.serving.tiny import image, mean_colours, serving

SHORT = Limits(
    requests=8, images=16, body_bytes=1 << 20, buffered_bytes=3 << 20, head_s=0.4, body_s=0.5, stall_s=0.4
)


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny, limits=SHORT, batching=Batching(0.0, 2), cache_bytes=0) as running:
        yield running


def infer_body(pixels):
    one = triton.InferInput("image", [1, *pixels.shape], "UINT8")
    return triton.InferenceServerClient.generate_request_body([one.set_data_from_numpy(pixels[None])])


def infer(server, pixels, timeout=20):
    """The status, the features or None, and Retry-After."""
    body, header = infer_body(pixels)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        connection.request(
            "POST", "/v2/models/features/infer", body, {"Inference-Header-Content-Length": str(header)}
        )
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            assert json.loads(content)["error"]
            return answer.status, None, answer.headers["Retry-After"]
        length = int(answer.headers["Inference-Header-Content-Length"])
        result = triton.InferenceServerClient.parse_response_body(content, header_length=length)
        return 200, result.as_numpy("features")[0], None
    finally:
        connection.close()


def raw(server, data=b""):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def received(connection):
    """Read all that the server sends until it closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@contextmanager
def busy(server, loops):
    """Keep the engine busy with an image that takes some time. Yields the answer."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(infer, server, image(0, loops=loops))
        while not server.service.worker.running:
            time.sleep(0.001)
        yield answer


def settled(server):
    """Wait until no request holds anything."""
    for _ in range(2000):
        gate = server.gate
        left = (gate.reading, gate.in_flight, gate.buffered, server.service.worker.waiting)
        if left == (0, 0, 0, 0):
            return
        time.sleep(0.005)
    pytest.fail(f"reading, in flight, buffered, waiting: {left}")


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server):
    head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    with raw(server, head) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    settled(server)


def test_a_body_that_hides_its_length(server):
    def chunks():
        for _ in range(40):
            yield bytes(65536)

    with suppress(requests.ConnectionError):  # it may still be sending
        assert requests.post(f"{server.url}/match", data=chunks(), timeout=10).status_code == 413
    settled(server)


def test_one_byte_a_second_of_a_body(server):
    """A slow body is answered with 408 when its time is over, and others are served in the meantime."""
    head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    slow = [raw(server, head) for _ in range(20)]  # more than may be in flight
    for _ in range(3):
        for connection in slow:
            connection.sendall(b"x")
        assert infer(server, image(1))[0] == 200
        time.sleep(0.1)
    for connection in slow:
        assert received(connection).startswith(b"HTTP/1.1 408 ")
        connection.close()
    settled(server)


@pytest.mark.parametrize("first", [b"", b"G", b"GET /v2 HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_end(server, first):
    start = time.monotonic()
    with raw(server, first) as connection:
        assert received(connection) == b""
    assert time.monotonic() - start < 5


def test_a_second_head_that_does_not_end(server):
    with raw(server, b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /v2 HT")
        assert received(connection) == b""


def test_a_client_that_reads_nothing_is_dropped(server):
    """Answers of a megabyte as JSON, to a socket with a small buffer that nobody empties."""
    body, header = infer_body(image(1))
    pixels = np.zeros((16, 96, 96, 3), np.uint8)
    one = triton.InferInput("image", list(pixels.shape), "UINT8").set_data_from_numpy(pixels)
    outputs = [triton.InferRequestedOutput("features", binary_data=False)]
    body, header = triton.InferenceServerClient.generate_request_body([one], outputs=outputs)
    head = (
        f"POST /v2/models/features/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {header}\r\n\r\n"
    ).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(10)
    sent = 0
    try:
        for _ in range(200):  # until the server's buffers are full and it stops reading
            connection.sendall(head + body)
            sent += 1
    except (ConnectionError, TimeoutError):
        pass
    connection.close()
    assert sent < 200
    settled(server)
    assert infer(server, image(2))[0] == 200


def test_a_client_that_leaves_takes_its_request_with_it(server):
    before = failures(server)
    body, header = infer_body(image(2, fails=True))  # would be counted if it were run
    head = (
        f"POST /v2/models/features/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {header}\r\n\r\n"
    ).encode()
    with busy(server, 40), raw(server, head + body):
        while server.service.worker.waiting == 0:
            time.sleep(0.002)
    settled(server)
    assert failures(server) == before


def failures(server):
    text = requests.get(f"{server.url}/metrics", timeout=9).text
    return next(line for line in text.splitlines() if line.startswith("ditf_engine_failures_total"))


def test_a_client_that_leaves_in_the_middle_of_its_body(server):
    head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n12345"
    with raw(server, head):
        while server.gate.reading == 0:
            time.sleep(0.002)
    settled(server)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"A" * 200_000,
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_http(server, data):
    try:
        with raw(server, data) as connection:
            assert received(connection)[9:12] in (b"400", b"421", b"422", b"")
    except ConnectionError:
        pass
    assert infer(server, image(3))[0] == 200


def test_200_clients_at_once(server):
    """Each gets its own right answer or 503 at once, and then there is room again."""
    together = threading.Barrier(200)

    def client(seed):
        together.wait(20)
        start = time.monotonic()
        return (*infer(server, image(seed, loops=1)), time.monotonic() - start)

    with busy(server, 30), ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(client, range(200)))
    for seed, (status, found, retry, _) in enumerate(answers):
        assert status in (200, 503)
        if status == 200:
            np.testing.assert_allclose(found, mean_colours(image(seed, loops=1)), rtol=1e-5)
        else:
            assert retry == "1"
    statuses = [status for status, *_ in answers]
    assert statuses.count(200) >= 7  # beside the slow one, as many as may be in flight
    assert statuses.count(503) >= 1
    settled(server)
    assert infer(server, image(9))[0] == 200


def test_a_deadline(tiny):
    limits = Limits(deadline_s=0.1)
    with serving(tiny, limits=limits, batching=Batching(0.0, 1)) as server, busy(server, 250):
        start = time.monotonic()
        assert infer(server, image(1))[0] == 504
        assert time.monotonic() - start < 5


def test_too_many_bytes_of_bodies_together(tiny):
    limits = Limits(body_bytes=1 << 20, buffered_bytes=1 << 20, body_s=5)
    with serving(tiny, limits=limits) as server:
        head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
        with raw(server, head + bytes(800_000)):
            while server.gate.buffered < 800_000:
                time.sleep(0.002)
            with raw(server, head + bytes(800_000)) as second:
                assert second.recv(65536).startswith(b"HTTP/1.1 503 ")
        settled(server)


def test_what_is_inflated_counts(tiny):
    """A megabyte of zeros is a kilobyte of gzip: a few of them fill the room, one by one they pass."""
    limits = Limits(body_bytes=1 << 20, buffered_bytes=1 << 20)
    with serving(tiny, limits=limits, batching=Batching(0.0, 1), cache_bytes=0) as server, busy(server, 60):
        body = gzip.compress(np.zeros((25, 96, 96, 3), np.uint8).tobytes())

        def send(_):
            headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": "0"}
            url = f"{server.url}/v2/models/features/infer"
            return requests.post(url, body, headers=headers, timeout=20).status_code

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(send, range(4))) == [200, 503, 503, 503]
        settled(server)


def test_what_json_is_parsed_to_counts(tiny):
    """Numbers of the wrong shape are refused for that, until they are too many to find it out."""
    with serving(tiny, limits=Limits(buffered_bytes=1 << 20)) as server:
        for count, status in ((40_000, 400), (120_000, 503)):
            tensor = {"name": "image", "shape": [1, 96, 96, 3], "datatype": "UINT8", "data": [1] * count}
            url = f"{server.url}/v2/models/features/infer"
            assert requests.post(url, json={"inputs": [tensor]}, timeout=20).status_code == status
            settled(server)


def test_heat_maps_of_large_images_count(tiny):
    limits = Limits(buffered_bytes=6 << 20)
    with serving(tiny, limits=limits) as server:
        files = {"source": encoded(image(1)), "target": encoded(np.zeros((1000, 1000, 3), np.uint8))}
        data = {"point": "1,1"}
        answer = requests.post(f"{server.url}/heat-map", files=files, data=data, timeout=20)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        settled(server)


def test_points_times_pixels_are_bounded(tiny):
    with serving(tiny, limits=Limits(scores=100_000)) as server:
        files = {"source": encoded(image(1)), "target": encoded(image(2))}
        answers = [
            requests.post(f"{server.url}/match", files=files, data={"points": points}, timeout=20)
            for points in (["1,1"] * 10, ["1,1"] * 11)
        ]
        assert [answer.status_code for answer in answers] == [200, 413]
        assert "more than 10" in answers[1].json()["error"]


def test_a_target_of_one_row_and_a_million_columns(server):
    """The image has few pixels, but matching in it would take a minute, so sides are bounded too."""
    tensors = {
        "source": np.zeros((3, 12, 12), np.float32),
        "target": np.zeros((3, 12, 12), np.float32),
        "source_size": np.array([96, 96]),
        "target_size": np.array([1, 1_048_575]),
        "points": np.zeros((1, 2), np.float32),
    }
    with triton.InferenceServerClient(server.address) as client:
        inputs = [
            triton.InferInput(
                name, list(array.shape), "INT64" if array.dtype.kind == "i" else "FP32"
            ).set_data_from_numpy(array)
            for name, array in tensors.items()
        ]
        with pytest.raises(InferenceServerException, match="a side more than 16,384") as caught:
            client.infer("match", inputs)
    assert caught.value.status() == "413"


def test_nothing_is_begun_after_the_deadline(tiny):
    with serving(tiny, limits=Limits(deadline_s=1e-9)) as server:
        assert infer(server, image(1))[0] == 504
        settled(server)
        assert "ditf_batch_images_count 0.0" in requests.get(f"{server.url}/metrics", timeout=9).text


def test_a_running_call_does_not_keep_its_client_past_the_deadline(tiny):
    with serving(tiny, limits=Limits(deadline_s=0.05), batching=Batching(0.0, 1)) as server:
        assert infer(server, image(1, loops=250))[0] == 504
        assert server.service.worker.running  # it cannot be stopped, but nobody waits for it


def test_draining(tiny):
    """Requests in flight are answered, later ones are refused, and the server is not ready."""
    with serving(tiny, batching=Batching(0.0, 1)) as server, requests.Session() as held:
        assert held.get(f"{server.url}/v2/health/ready", timeout=9).status_code == 200
        with busy(server, 250) as slow:
            server.server.handle_exit(15, None)
            assert held.get(f"{server.url}/v2/health/ready", timeout=9).status_code == 503
            assert held.get(f"{server.url}/v2/health/live", timeout=9).status_code == 200
            assert infer(server, image(1))[0] == 503
        status, found, _ = slow.result()
        assert status == 200
        np.testing.assert_allclose(found, mean_colours(image(0, loops=250)), rtol=1e-5)


def test_draining_is_bounded(tiny):
    with serving(tiny, limits=Limits(drain_s=0.1), batching=Batching(0.0, 1)) as server:
        head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n12345"
        with raw(server, head):
            while server.gate.reading == 0:
                time.sleep(0.002)
            start = time.monotonic()
            server.server.handle_exit(15, None)
            while server.server.started and not server.server.should_exit:
                time.sleep(0.01)
            assert time.monotonic() - start < 5


def test_a_key(tiny):
    with serving(tiny, api_key="s3cret") as server:

        def status(path, **headers):
            return requests.get(server.url + path, headers=headers, timeout=9).status_code

        assert status("/v2/health/ready") == status("/v2/health/live") == 200
        for path in ("/v2", "/bundles", "/metrics", "/openapi.json", "/v2/models/features", "/nothing"):
            assert status(path) == 401
            assert status(path, Authorization="Bearer s3cre") == 401
        assert status("/v2", Authorization="Bearer s3cret") == 200
        assert status("/v2", **{"X-API-Key": "s3cret"}) == 200
        assert status("/v2", **{"X-API-Key": "\xff\xfe"}) == 401
        assert requests.post(f"{server.url}/match", timeout=9).status_code == 401
        with triton.InferenceServerClient(server.address) as client:
            headers = {"Authorization": "Bearer s3cret"}
            assert client.get_server_metadata(headers=headers)["name"] == "ditf"


def test_a_name_that_resolves_to_the_loopback_is_not_it(server):
    def status(host):
        return requests.get(f"{server.url}/v2", headers={"Host": host}, timeout=9).status_code

    assert status("evil.example") == status("evil.example:8000") == status("127.0.0.1.evil.example") == 421
    assert status(f"localhost:{server.port}") == status("LOCALHOST") == status("[::1]:80") == 200


def test_pages_of_other_sites_may_not_ask(server):
    """Browsers send the origin of a request, whatever the page wants."""
    for site, expected in (("cross-site", 403), ("same-origin", 422), ("none", 422)):
        answer = requests.post(f"{server.url}/match", headers={"Sec-Fetch-Site": site}, timeout=9)
        assert answer.status_code == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:{port}", 422),
        ("https://127.0.0.1:{port}", 403),
        ("http://127.0.0.1:1", 403),
        ("http://127.0.0.1", 403),
        ("http://localhost:{port}", 403),
        ("http://evil.example", 403),
        ("http://evil.example@127.0.0.1:{port}", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_an_origin_is_that_of_the_host(server, origin, expected):
    headers = {"Origin": origin.format(port=server.port)}
    assert requests.post(f"{server.url}/match", headers=headers, timeout=9).status_code == expected


def test_a_page_of_another_port_may_not_ask(server):
    """A browser treats the request as of the same site and says so; the page itself may be linked to."""
    headers = {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:1"}
    assert requests.get(f"{server.url}/bundles", headers=headers, timeout=9).status_code == 403
    assert requests.get(f"{server.url}/", headers=headers, timeout=9).status_code == 200


def test_nothing_is_read_after_a_body_with_two_lengths(server):
    """The request has Content-Length and Transfer-Encoding, and nobody knows which one a proxy used."""
    second = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = (
        b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(second))
    )
    with raw(server, head + second) as connection:
        answer = received(connection)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_a_new_connection_replaces_the_longest_idle_one(tiny):
    with serving(tiny, limits=Limits(connections=4)) as server:
        held = [raw(server) for _ in range(4)]
        while len(server.server.connections) < 4:
            time.sleep(0.002)
        assert requests.get(f"{server.url}/v2", timeout=9).status_code == 200
        first, *others = held
        with first:
            assert received(first) == b""
        for connection in others:
            with connection:
                connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_health_is_answered_when_every_connection_is_busy(tiny):
    with serving(tiny, limits=Limits(connections=4, connections_spare=1)) as server:
        head = b"POST /match HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n12345"
        held = [raw(server, head) for _ in range(4)]
        while server.gate.reading < 4:
            time.sleep(0.002)
        for _ in range(3):
            assert requests.get(f"{server.url}/v2/health/ready", timeout=9).status_code == 200
        answer = requests.get(f"{server.url}/v2", timeout=9)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.headers["Connection"] == "close"
        for connection in held:
            connection.close()
        settled(server)
        assert requests.get(f"{server.url}/v2", timeout=9).status_code == 200


def test_a_line_of_log_for_each_request(server, caplog):
    logging.getLogger("ditf.serve").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, "ditf.serve"):
        requests.get(f"{server.url}/v2", headers={"X-Request-Id": "abc"}, timeout=9)
        for _ in range(200):
            if caplog.records:
                break
            time.sleep(0.005)
    [record] = caplog.records
    assert record.fields["request_id"] == "abc"
    assert (record.fields["path"], record.fields["status"]) == ("/v2", 200)


def test_a_body_in_pieces_leaves_turns_to_others():
    """A form is parsed in the event loop, and a large one must not block other requests."""
    pieces = deque([b"piece"] * 5)
    turns = []
    now = 0

    async def app(scope, receive, send):
        more = True
        while more:
            more = (await receive())["more_body"]
            turns.append(now)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        if pieces:
            piece = pieces.popleft()
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        return await asyncio.Event().wait()

    async def send(message):
        pass

    async def run():
        nonlocal now
        scope = {"type": "http", "scheme": "http", "method": "POST", "path": "/", "headers": []}
        answer = asyncio.ensure_future(RequestGate(app, Limits(), ServerMetrics())(scope, receive, send))
        while not answer.done():
            now += 1
            await asyncio.sleep(0)

    asyncio.run(run())
    assert len(set(turns)) == 5
