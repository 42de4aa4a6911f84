"""The example service, asked by a real client over the loopback interface."""

import asyncio
import contextlib
import importlib.util
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim_fast.deploy import OnnxSampler
from ddim_fast.deploy.onnx_export import export_onnx
from ddim_fast.io.pictures import to_uint8

pytestmark = pytest.mark.slow  # servers under load

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

SERVER = Path(__file__).parents[2] / "examples" / "onnx_server" / "server.py"


@pytest.fixture(scope="module")
def server_module():
    sys.path.insert(0, str(SERVER.parent))
    spec = importlib.util.spec_from_file_location("onnx_server", SERVER)
    module = sys.modules["onnx_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SERVER.parent))
    del sys.modules["onnx_server"], sys.modules["prompt_protocol"]


@pytest.fixture(scope="module")
def slow_folder(exported, tmp_path_factory):
    """An export whose sampler takes a while."""
    folder = tmp_path_factory.mktemp("server") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddim_fast.deploy.onnx_export.export_network", lambda model, dtype, opset: exported[1:])
        export_onnx(folder, exported.model, steps=300)
    return folder


@contextlib.contextmanager
def serve(folder):
    """The process, a client of it and its port."""
    command = [sys.executable, SERVER, "--model", folder, "--port", "0", "--batch", "4", "--queue", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(
                r"loading (.+) \.\.\. listening at (http://127\.0\.0\.1:(\d+)) \(CPU\w+, float32, \d+ steps\)\n", line
            )
            assert found and found[1] == str(folder), (line, process.stderr.read())
            with httpx.Client(base_url=found[2], timeout=60) as client:
                yield process, client, int(found[3])
        finally:
            process.kill()


@pytest.fixture
def server(slow_folder):
    """One that takes a while for an image."""
    with serve(slow_folder) as started:
        yield started


@pytest.fixture(scope="module")
def fast_server(export_folder):
    """One that takes no time for an image."""
    with serve(export_folder) as started:
        yield started


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def everything(connection: socket.socket) -> bytes:
    """What a server sends until it closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def post(body: bytes, *headers: bytes) -> bytes:
    """A request for images, by the byte."""
    lines = [b"POST /images HTTP/1.1", b"Host: a", b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers, b"", body])


def pixels(answer) -> np.ndarray:
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_a_service_answers_refuses_and_ends(server, slow_folder):
    process, client, _ = server
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["waiting"] == 0 and health["dtype"] == "float32"

    sampler = OnnxSampler(slow_folder)
    expected = np.concatenate(to_uint8(sampler.sample(seeds=[7, 8], labels=3)), axis=1)
    found = pixels(client.post("/images", json={"seeds": [7, 8], "class": 3}))
    assert np.abs(found.astype(int) - expected).max() <= 1

    for body, status, said in (
        ({"seeds": list(range(5))}, 413, "5 images are more than 4"),
        ({"seeds": [0], "class": 10}, 422, "class 10 is out of range"),
        ({"seeds": [-1]}, 422, "a seed is a whole number"),
        ({"seeds": []}, 422, "seeds"),
        ({"seeds": [1], "clas": 3}, 422, "clas"),
        ({"seeds": ["1"]}, 422, "seeds"),
        ({}, 422, "seeds"),
        ({"seeds": [1] * 10_000}, 413, "at most 16384 bytes"),
    ):
        answer = client.post("/images", json=body)
        assert answer.status_code == status and said in answer.text
    assert client.post("/images", content=iter([b"{}"])).status_code == 411
    assert client.get("/images").status_code == 405
    described = client.get("/openapi.json").json()["paths"]["/images"]["post"]["requestBody"]
    assert set(described["content"]["application/json"]["schema"]["properties"]) == {"seeds", "class"}

    # More at once than may wait: each is answered as if it were alone, or refused.
    alone = np.concatenate(to_uint8(sampler.sample(seeds=[1, 2], labels=5)), axis=1).astype(int)
    with ThreadPoolExecutor(24) as threads:
        ask = lambda _: client.post("/images", json={"seeds": [1, 2], "class": 5})  # noqa: E731
        answers = list(threads.map(ask, range(24)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert np.abs(pixels(answer) - alone).max() <= 1
        else:
            assert "images are waiting" in answer.text and answer.headers["retry-after"] == "1"

    # What was begun before a SIGTERM is finished.
    with ThreadPoolExecutor(3) as threads:
        begun = [threads.submit(client.post, "/images", json={"seeds": [k, k, k, 3], "class": 5}) for k in range(3)]
        while client.get("/health").json()["waiting"] < 8:
            assert not any(answer.done() for answer in begun), [a.result() for a in begun if a.done()]
        process.send_signal(signal.SIGTERM)
        assert [pixels(answer.result()).shape for answer in begun] == [(8, 32, 3)] * 3
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


# A request, the status of its answer, and what that says.
BAD_BODIES = [
    (b"", 422, "Invalid JSON"),
    (b"{", 422, "Invalid JSON"),
    (b"null", 422, "object"),
    (b"[]", 422, "object"),
    (b"7", 422, "object"),
    (b'"seeds"', 422, "object"),
    (b"NaN", 422, "object"),
    (b'{"seeds": NaN}', 422, "seeds"),
    (b'{"seeds": [NaN]}', 422, "valid integer"),
    (b'{"seeds": [Infinity]}', 422, "valid integer"),
    (b'{"seeds": [-Infinity]}', 422, "valid integer"),
    (b'{"seeds": [1e400]}', 422, "valid integer"),
    (b'{"seeds": [1.5]}', 422, "valid integer"),
    (b'{"seeds": [true]}', 422, "valid integer"),
    (b'{"seeds": [null]}', 422, "valid integer"),
    (b'{"seeds": [[1]]}', 422, "valid integer"),
    (b'{"seeds": {"0": 1}}', 422, "seeds"),
    (b'{"seeds": 1}', 422, "seeds"),
    (b'{"seeds": [9223372036854775808]}', 422, "2^63"),
    (b'{"seeds": [%s]}' % (b"9" * 4000), 422, "2^63"),
    (b'{"seeds": [%s]}' % (b"9" * 9000), 422, "Invalid JSON"),
    (b'{"seeds": [1], "class": 1e400}', 422, "valid integer"),
    (b'{"seeds": [1], "class": NaN}', 422, "valid integer"),
    (b'{"seeds": [1], "class": %s}' % (b"9" * 4000), 422, "class"),
    (b'{"seeds": [1], "class": -1}', 422, "out of range"),
    (b'{"seeds": ["\\ud800"]}', 422, "Invalid JSON"),
    (b'{"seeds": [1], "\\ud800": 1}', 422, "Invalid JSON"),
    (b'{"seeds": [1], "class": "\\ud800"}', 422, "Invalid JSON"),
    (b'{"seeds": [1], "\\u0000": 1}', 422, "not permitted"),
    (b'{"seeds": ["\xff\xfe"]}', 422, "Invalid JSON"),
    (b"\xff\xfe{\x00}\x00", 422, "Invalid JSON"),
    (b"\x00" * 100, 422, "Invalid JSON"),
    (b"[" * 16_000, 422, "Invalid JSON"),
    (b'{"seeds": ' + b"[" * 7000 + b"]" * 7000 + b"}", 422, "Invalid JSON"),
    (b'{"seeds": [1]} {"seeds": [1]}', 422, "Invalid JSON"),
    (b'{"seeds": [1], "class": 3, "label": 3}', 422, "not permitted"),
]


@pytest.mark.parametrize(("body", "status", "said"), BAD_BODIES, ids=lambda value: repr(value)[:40])
def test_a_bad_body_is_told_what_is_wrong(fast_server, body, status, said):
    _, client, _ = fast_server
    answer = client.post("/images", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and said in json.dumps(answer.json()["detail"])
    assert client.post("/images", json={"seeds": [1], "class": 3}).status_code == 200


GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
FINE = b'{"seeds": [1], "class": 3}'
MUCH = b" " * 3_000_000  # more than the buffers of the sockets hold

# What a client sends, and the statuses of the answers it gets.
BAD_REQUESTS = {
    "not HTTP": (b"hello\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), [400]),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", [400]),
    "no version": (b"GET /health\r\nHost: a\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [404, 400]),
    "a line of nothing but spaces": (b"     \r\n\r\n", [400]),
    "a space in the path": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", [400]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (GET + b"Host: b\r\n\r\n", [400]),
    "a header without a colon": (GET + b"bad\r\n\r\n", [400]),
    "a header without a name": (GET + b": bad\r\n\r\n", [400]),
    "NUL in a header": (GET + b"a: \x00\r\n\r\n", [400]),
    "a negative length": (GET + b"Content-Length: -1\r\n\r\n", [400]),
    "a length in hex": (GET + b"Content-Length: 0x10\r\n\r\n", [400]),
    "a length of 5000 digits": (GET + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
    "two lengths": (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", [400]),
    "an unknown encoding": (GET + b"Transfer-Encoding: rot13\r\n\r\n", [501]),
    "a long header": (GET + b"a: " + MUCH, [431]),
    "many headers": (GET + b"a: b\r\n" * 500_000, [431]),
    "a long line": (b"GET /" + MUCH, [431]),
    "a method of its own": (b"BREW /images HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [405]),
    "another method": (b"DELETE /images HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [405]),
    "CONNECT": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [404]),
    "a path that is not there": (b"GET /%ff%00/.. HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [404]),
    "an upgrade": (GET + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n", [200]),
    "no length": (b"POST /images HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [411]),
    "a bad chunk": (b"POST /images HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", [400]),
    "chunks": (
        b"POST /images HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        [411],
    ),
    "a large body": (post(MUCH, b"Connection: close"), [413]),
    "a large body, kept alive": (post(MUCH) + GET + b"Connection: close\r\n\r\n", [413, 200]),
    "a large body that is expected": (post(b"", b"Connection: close").replace(b"Length: 0", b"Length: 99999"), [413]),
    "a form": (post(FINE, b"Connection: close").replace(b"json", b"x-www-form-urlencoded"), [415]),
    "no type": (post(FINE, b"Connection: close").replace(b"Content-Type: application/json\r\n", b""), [415]),
    "a type of nothing": (post(FINE, b"Connection: close").replace(b"application/json", b""), [415]),
    "a type in other letters": (post(FINE, b"Connection: close").replace(b"/json", b"/JSON;charset=utf-8"), [200]),
    "one after the other": (post(FINE) + GET + b"\r\n" + b"nonsense\r\n\r\n", [200, 200, 400]),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_answered_before_its_connection_closes(fast_server, name):
    _, client, port = fast_server
    request, statuses = BAD_REQUESTS[name]
    with connect(port) as connection:
        connection.sendall(request)
        answer = everything(connection)
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)] == statuses, answer
    assert pixels(client.post("/images", json={"seeds": [1], "class": 3})).shape == (8, 8, 3)


def test_a_client_that_sends_no_more_gets_its_answer(fast_server):
    for request, status in ((GET + b"\r\n", 200), (post(FINE), 200), (GET, 400), (post(FINE)[:-3], 400)):
        with connect(fast_server[2]) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            assert everything(connection).startswith(b"HTTP/1.1 %d " % status)


def test_requests_that_never_end_are_dropped(fast_server):
    """400 of them keep nobody out."""
    _, client, port = fast_server
    halves = {
        GET: b"HTTP/1.1 408 ",
        post(FINE)[:-3]: b"HTTP/1.1 408 ",
        post(MUCH)[:-3]: b"HTTP/1.1 413 ",
        GET + b"\r\n" + GET: b"HTTP/1.1 200 ",  # and 408 after it
        b"": b"",
    }
    with contextlib.ExitStack() as stack:
        start = time.monotonic()
        waiting = [(stack.enter_context(connect(port)), first) for _ in range(80) for first in halves.values()]
        for (connection, _), half in zip(waiting, list(halves) * 80, strict=True):
            connection.sendall(half)
        drip = stack.enter_context(connect(port))  # a byte now and then
        drip.sendall(b"GET /health HTTP/1.1\r\na: ")
        while time.monotonic() < start + 8:
            drip.sendall(b"b")
            assert client.post("/images", json={"seeds": [1], "class": 3}).status_code == 200
            time.sleep(0.5)
        for connection, first in waiting:
            answer = everything(connection)
            assert answer.startswith(first) and (first or not answer)
            if b" 200 " in first:
                assert b"HTTP/1.1 408 Request Timeout" in answer and b"10 s to arrive" in answer
        assert everything(drip).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() < start + 20


def test_open_connections_do_not_keep_a_server_from_ending(export_folder):
    with serve(export_folder) as (process, client, port), contextlib.ExitStack() as stack:
        idle, begun, sending, unread = ([stack.enter_context(connect(port)) for _ in range(100)] for _ in range(4))
        for connections, request in ((begun, GET), (sending, post(FINE)[:-3]), (unread, GET + b"\r\n")):
            for connection in connections:
                connection.sendall(request)
        assert client.get("/health").status_code == 200
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for connection in begun + sending:
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in answer.lower()
        assert all(everything(connection) == b"" for connection in idle)
        assert process.wait(20) in (0, -signal.SIGTERM) and time.monotonic() < start + 8
        assert process.stderr.read() == ""


def test_too_many_connections_are_told_to_come_back(export_folder):
    with serve(export_folder) as (_, client, port):
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(port)) for _ in range(510)]
            answer = everything(connections[-1])
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in answer
        assert client.get("/health").status_code == 200


@contextlib.asynccontextmanager
async def serve_here(server_module, app, **settings):
    """uvicorn's server in this process, and a function that sends a request and gives the streams."""
    config = uvicorn.Config(app, http=server_module.PromptProtocol, log_level="critical", **settings)
    server, listener = uvicorn.Server(config), server_module.listen("127.0.0.1", 0)
    running = asyncio.create_task(server.serve([listener]))
    writers = []  # which would close when nobody has them

    async def send(request):
        reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=2**20)
        writer.write(request)
        writers.append(writer)
        return reader, writer

    yield server, send
    server.should_exit = True
    await running
    for writer in writers:
        writer.close()


class Held:
    """A sampler that waits until it is released."""

    provider, dtype = "CPUExecutionProvider", "float32"

    def __init__(self):
        self.sampled, self.released = [], threading.Event()

    def check(self, **request):
        pass

    def sample(self, *, seeds, **request):
        self.sampled += seeds
        self.released.wait(60)
        return np.zeros((len(seeds), 3, 8, 8), np.float32)


def test_work_that_takes_too_long_is_given_up_by_a_shutdown(server_module):
    """Those that wait for it are told."""
    sampler = Held()

    async def ask():
        async with serve_here(server_module, server_module.make_app(sampler), timeout_graceful_shutdown=1) as (server, send):
            reader, _ = await send(post(FINE))
            await asyncio.sleep(0.5)
            server.should_exit = True
            answer = await reader.read()
        sampler.released.set()
        return answer

    answer = asyncio.run(ask())
    assert answer.startswith(b"HTTP/1.1 503 ") and b"the server is shutting down" in answer


def test_nothing_is_sampled_for_clients_that_are_gone(server_module, monkeypatch):
    monkeypatch.setattr("prompt_protocol.REQUEST_TIMEOUT", 1)
    sampler = Held()

    async def ask():
        async with serve_here(server_module, server_module.make_app(sampler)) as (_, send):
            there, _ = await send(post(b'{"seeds": [1]}'))
            await asyncio.sleep(0.3)
            last, _ = await send(post(b'{"seeds": [2]}'))
            ended, writer = await send(post(b'{"seeds": [3]}'))
            writer.write_eof()
            _, writer = await send(post(b'{"seeds": [4]}'))
            await asyncio.sleep(0.3)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()  # which resets the connection then
            answer = await ended.read()
            assert answer.startswith(b"HTTP/1.1 408 ") and b"its client sends no more" in answer
            sampler.released.set()
            assert (await there.readline()).startswith(b"HTTP/1.1 200 ")
            assert (await last.readline()).startswith(b"HTTP/1.1 200 ")
            health, _ = await send(GET + b"Connection: close\r\n\r\n")
            assert b'"waiting":0' in await health.read()

    asyncio.run(ask())
    assert sampler.sampled == [1, 2]


def test_a_shutdown_does_not_wait_for_clients_that_may_be_gone(server_module):
    sampler = Held()

    async def ask():
        async with serve_here(server_module, server_module.make_app(sampler)) as (server, send):
            _, gone = await send(post(FINE))
            gone.close()
            reader, writer = await send(post(FINE))
            writer.write_eof()
            await asyncio.sleep(0.5)
            server.should_exit = True
            return await asyncio.wait_for(reader.read(), 5)

    try:
        assert asyncio.run(ask()).startswith(b"HTTP/1.1 503 ")
        assert not sampler.released.is_set()
    finally:
        sampler.released.set()


def test_a_client_that_reads_slowly_gets_all_and_one_that_stops_is_dropped(server_module, monkeypatch):
    monkeypatch.setattr("prompt_protocol.LINGER_TIMEOUT", 0.5)
    size = 30_000_000

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
            await send({"type": "http.response.body", "body": bytes(size)})

    async def ask():
        async with serve_here(server_module, app, lifespan="off") as (server, send):
            (slow, _), (stopped, _) = [await send(GET + b"Connection: close\r\n\r\n") for _ in range(2)]
            await slow.readuntil(b"\r\n\r\n")
            read = 0
            while part := await slow.read(2**20):
                read += len(part)
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.5)
            assert not server.server_state.connections
            with contextlib.suppress(ConnectionResetError):
                assert len(await stopped.read()) < size
        return read

    assert asyncio.run(ask()) == size


def test_a_network_that_overflows_is_an_error_not_a_black_picture(server_module):
    """Only for those whose images are not finite."""
    from fastapi.testclient import TestClient

    class Overflowing:
        provider, dtype = "CPUExecutionProvider", "float16"
        check = staticmethod(lambda **request: None)

        def sample(self, *, seeds, **request):
            return np.stack([np.full((3, 8, 8), np.nan if seed == 7 else 0.0, np.float32) for seed in seeds])

    with TestClient(server_module.make_app(Overflowing())) as client:
        assert client.post("/images", json={"seeds": [1]}).status_code == 200
        answer = client.post("/images", json={"seeds": [1, 7]})
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the images are not finite; try dtype float32 (--dtype float32)"}


def test_a_server_without_a_model_says_so(tmp_path):
    done = subprocess.run([sys.executable, SERVER, "--model", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_a_server_whose_port_is_taken_says_so(export_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, said in (
            (taken.getsockname()[1], "in use; choose another"),
            (99999, "--port must be in 0..65535; got 99999"),
        ):
            command = [sys.executable, SERVER, "--model", export_folder, "--port", str(port)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and said in done.stderr
            assert "Traceback" not in done.stderr
