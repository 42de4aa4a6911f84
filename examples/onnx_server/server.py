"""An HTTP service that samples images from an export to ONNX or to a plan, without torch.

    python server.py --model FOLDER --port 8000
    curl -X POST localhost:8000/images -H 'content-type: application/json' -d '{"seeds": [1, 2], "class": 9}' -o images.png

One worker samples; requests that wait while it does are sampled together next. What it cannot do soon it refuses: 413 where a
request asks for too many images or is too long, 422 where it makes no sense, 429 where too much is waiting. Clients that are
slow to send their request get 408.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import socket
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from PIL import Image
from prompt_protocol import LARGEST_HEADERS, RETRY_SOON, SHUTTING_DOWN, PromptProtocol
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from ddim_fast.deploy import OnnxSampler, PlanSampler
from ddim_fast.deploy.folder import is_plan
from ddim_fast.io.pictures import image_grid

LARGEST_BODY = 16_384  # bytes
SHUTDOWN_TIMEOUT = 20  # seconds for what was begun before a SIGTERM


class Images(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seeds: list[int] = Field(min_length=1, description="one image a seed")
    label: int | None = Field(None, alias="class", description="for all of them; none by default")


async def read_images(request: Request) -> Images:
    """The body of a request, which FastAPI would read at any length, and whose NaN its error message could not repeat in JSON.

    Raises:
        HTTPException: it is refused.
    """
    length = request.headers.get("content-length")
    if length is None:
        raise HTTPException(411, "a request needs a Content-Length")
    if int(length) > LARGEST_BODY:
        raise HTTPException(413, f"a request has at most {LARGEST_BODY} bytes; this one has {length}")
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"the Content-Type must be application/json; got {kind!r}")
    try:
        return Images.model_validate_json(await request.body())
    except ClientDisconnect:  # nobody hears it
        raise HTTPException(400, "the request ends too early") from None
    except ValidationError as error:
        raise HTTPException(422, error.errors(include_url=False, include_context=False, include_input=False)) from None


@dataclass
class _Waiting:
    request: Images
    result: asyncio.Future[np.ndarray]


class Worker:
    """Samples for all requests, one batch after the other.

    Args:
        sampler: makes the images.
        batch: images at once, and the most that one request gets.
        queue: images that may wait.
        guidance: for those that have a class.
    """

    def __init__(self, sampler: OnnxSampler | PlanSampler, batch: int, queue: int, guidance: float | None) -> None:
        self.sampler, self.batch, self.queue, self.guidance = sampler, batch, queue, guidance
        self.waiting: deque[_Waiting] = deque()
        self._busy = False
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    @property
    def images(self) -> int:
        """How many wait."""
        return sum(len(w.request.seeds) for w in self.waiting if not w.result.cancelled())

    def put(self, request: Images) -> asyncio.Future[np.ndarray]:
        """What will be the images of one request, (N, C, H, W) float32; cancelled, they are not sampled.

        Raises:
            HTTPException: it is refused.
        """
        count = len(request.seeds)
        if count > self.batch:
            raise HTTPException(413, f"{count} images are more than {self.batch}, the most of one request")
        try:  # what the sampler itself would refuse, before it waits
            self.sampler.check(seeds=request.seeds, labels=request.label)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if self.images + count > self.queue + (0 if self._busy else self.batch):
            raise HTTPException(429, f"{self.images} images are waiting; try again", headers=RETRY_SOON)
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self._arrived.set()
        return waiting.result

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._busy = True
            while self.waiting:
                await self._serve(self._next_batch())
            self._busy = False

    def _next_batch(self) -> list[_Waiting]:
        """The first of those that wait, and as many more as fit, with a class as it or without one as it."""
        chosen: list[_Waiting] = []
        self.waiting = deque(w for w in self.waiting if not w.result.cancelled())
        if not self.waiting:
            return chosen
        room, labelled = self.batch, self.waiting[0].request.label is not None
        while self.waiting:
            request = self.waiting[0].request
            if len(request.seeds) > room or (request.label is not None) != labelled:
                break
            room -= len(request.seeds)
            chosen.append(self.waiting.popleft())
        return chosen

    async def _serve(self, chosen: list[_Waiting]) -> None:
        if not chosen:
            return
        seeds = [seed for w in chosen for seed in w.request.seeds]
        labels = None
        if chosen[0].request.label is not None:
            labels = [w.request.label for w in chosen for _ in w.request.seeds]
        guidance = None if labels is None else self.guidance

        def compute() -> np.ndarray:
            return self.sampler.sample(seeds=seeds, labels=labels, guidance=guidance, batch_size=self.batch)

        try:
            images = await asyncio.get_running_loop().run_in_executor(self._thread, compute)
        except Exception as error:
            for w in chosen:
                if not w.result.done():
                    w.result.set_exception(error)
            return
        start = 0
        for w in chosen:
            stop = start + len(w.request.seeds)
            if not w.result.done():
                w.result.set_result(images[start:stop])
            start = stop


def make_app(sampler: OnnxSampler | PlanSampler, *, batch: int = 16, queue: int = 64, guidance: float | None = None) -> FastAPI:
    """The service; arguments as of :class:`Worker`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = Worker(sampler, batch, queue, guidance)
        task = asyncio.create_task(app.state.worker.run())
        yield
        task.cancel()  # uvicorn has waited for the answers by then

    app = FastAPI(title="ddim_fast", lifespan=lifespan)

    body = {"required": True, "content": {"application/json": {"schema": Images.model_json_schema()}}}
    png = {200: {"content": {"image/png": {}}}}

    @app.post("/images", response_class=Response, responses=png, openapi_extra={"requestBody": body})
    async def images(http: Request, request: Annotated[Images, Depends(read_images)]) -> Response:
        """The images side by side, as one PNG."""
        sampling = app.state.worker.put(request)
        gone = asyncio.ensure_future(http.receive())  # after the body, the next message is that the client is gone
        try:
            await asyncio.wait((sampling, gone), return_when=asyncio.FIRST_COMPLETED)
            if not sampling.done():
                raise HTTPException(408, "the client is gone")  # who does not hear it
            sampled = sampling.result()
        except asyncio.CancelledError:  # a shutdown takes too long
            raise HTTPException(503, SHUTTING_DOWN, headers=RETRY_SOON) from None
        finally:
            gone.cancel()
            sampling.cancel()
        try:
            grid = image_grid(sampled, gap=0)
        except ValueError as error:  # the network overflowed
            raise HTTPException(500, str(error)) from None
        buffer = io.BytesIO()
        Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "waiting": app.state.worker.images, "provider": sampler.provider, "dtype": sampler.dtype}

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections there.

    Raises:
        ValueError: it cannot.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OverflowError:
        raise ValueError(f"--port must be in 0..65535; got {port}") from None
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # what follows repeats the address
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve images sampled from an export to ONNX.")
    model_help = "what export --to onnx or --to plan wrote (default: a packaged model)"
    parser.add_argument("--model", default="cifar10-64", help=model_help)
    parser.add_argument("--provider", help="ONNX Runtime's execution provider (default: the fastest that starts here)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (default: 8000)")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once, the most of a request (default: 16)")
    parser.add_argument("--queue", type=int, default=64, help="images that may wait (default: 64)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale for images with a class")
    arguments = parser.parse_args()
    print(f"loading {arguments.model} ...", end=" ", flush=True)
    try:
        is_onnx = not is_plan(Path(arguments.model))
        sampler = OnnxSampler(arguments.model, provider=arguments.provider) if is_onnx else PlanSampler(arguments.model)
        sampler.sample(seeds=[0])  # the first run is slower
        listener = listen(arguments.host, arguments.port)
    except (OSError, ValueError, RuntimeError) as error:
        print()
        parser.error(str(error))
    app = make_app(sampler, batch=arguments.batch, queue=arguments.queue, guidance=arguments.guidance)
    config = uvicorn.Config(
        app,
        http=PromptProtocol,
        ws="none",
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        log_level="warning",
    )
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    where = f"http://{host}:{listener.getsockname()[1]}"
    print(f"listening at {where} ({sampler.provider}, {sampler.dtype}, {len(sampler.timesteps)} steps)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
