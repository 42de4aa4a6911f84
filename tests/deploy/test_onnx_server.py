"""The example service, asked by a real client over the loopback interface."""

import importlib.util
import io
import signal
import socket
import subprocess
import sys
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
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

SERVER = Path(__file__).parents[2] / "examples" / "onnx_server" / "server.py"


@pytest.fixture(scope="module")
def server_module():
    spec = importlib.util.spec_from_file_location("onnx_server", SERVER)
    module = sys.modules["onnx_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["onnx_server"]


@pytest.fixture(scope="module")
def slow_folder(exported, tmp_path_factory):
    """An export whose sampler takes a while."""
    folder = tmp_path_factory.mktemp("server") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddim_fast.deploy.onnx_export.export_network", lambda model, dtype, opset: exported[1:])
        export_onnx(folder, exported.model, steps=300)
    return folder


@pytest.fixture
def server(slow_folder):
    """The process and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SERVER, "--model", slow_folder, "--port", port, "--batch", 4, "--queue", 8]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for _ in range(300):
            try:
                client.get("/health")
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        yield process, client
    process.kill()
    process.wait()
    process.stderr.close()


def pixels(answer) -> np.ndarray:
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_a_service_answers_refuses_and_ends(server, slow_folder):
    process, client = server
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
            assert not any(answer.done() for answer in begun)
        process.send_signal(signal.SIGTERM)
        assert [pixels(answer.result()).shape for answer in begun] == [(8, 32, 3)] * 3
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


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
