"""Stand-ins for the three deployments: they answer, publish themselves, and write down what happens to them.

They hold no model, so that a test of the life cycle starts in seconds. What they write goes, a line an event, into the
folder that ``config["model"]["name"]`` names.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from shoal.api.draining import DrainingBackend
from shoal.api.edge import unless_disconnected
from shoal.api.http_server import HttpServer
from shoal.cluster import directory
from shoal.errors import Cancelled, InvalidRequest, ModelError, ShoalError

# A file of this name in the folder makes prefill fail, or load for ever.
FAIL, STAY = "fail", "stay"


class Diary:
    """Events of all replicas, in one file each line of which is ``<who> <what>``."""

    def __init__(self, folder: str, who: str) -> None:
        self._file = Path(folder) / "diary"
        self._who = who

    def write(self, what: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{self._who} {what}\n")


class StandInPrefill:
    def __init__(self, config: dict[str, Any]) -> None:
        folder = config["model"]["name"]
        self._diary = Diary(folder, "prefill")
        if (Path(folder) / FAIL).exists():
            raise ModelError("there is no model here: put one there")
        directory.report_loading("prefill", 1, 2)
        if (Path(folder) / STAY).exists():
            self._diary.write("loading")
            threading.Event().wait()
        self._diary.write(f"threads {os.environ['OMP_NUM_THREADS']} {os.environ['OMP_WAIT_POLICY']}")
        self._entry = directory.entry_of_this_replica("prefill", metrics_address="127.0.0.1:1")
        directory.register(self._entry)

    async def prefill(self) -> None:
        try:
            self._diary.write("started")
            await asyncio.Event().wait()
        finally:
            self._diary.write("ended")

    async def __del__(self) -> None:
        directory.unregister(self._entry)
        self._diary.write("closed")


class StandInDecode:
    def __init__(self, config: dict[str, Any], prefill: DeploymentHandle) -> None:
        self._diary = Diary(config["model"]["name"], "decode")
        self._prefill = prefill
        self._diary.write(f"one of {directory.num_replicas()}, nice {os.getpriority(os.PRIO_PROCESS, 0)}")
        self._entry = directory.entry_of_this_replica(
            "decode", metrics_address="127.0.0.1:2", handoff_address="127.0.0.1:3"
        )
        directory.register(self._entry)

    async def generate(self, mode: str) -> AsyncIterator[int]:
        self._diary.write("started")
        try:
            if mode == "refuse":
                raise InvalidRequest("no such mode", param="mode")
            if mode == "prefill":
                await self._prefill.prefill.remote()
            yield 0
            if mode == "stay":
                await asyncio.Event().wait()
            yield 1
        finally:
            self._diary.write("ended")

    async def __del__(self) -> None:
        directory.unregister(self._entry)
        self._diary.write("closed")


class _Backend:
    def __init__(self, decode: DeploymentHandle) -> None:
        self._decode = decode

    async def generate(self, mode: str) -> AsyncGenerator[int, None]:
        outputs = self._decode.options(stream=True).generate.remote(mode)
        try:
            async for token in outputs:
                yield token
        finally:
            outputs.cancel()


class _Watched(StreamingResponse):
    """Ends when its client leaves, also while there is nothing to send."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Cancelled):
            await unless_disconnected(receive, self.stream_response(send))


class StandInGateway:
    async def __init__(self, config: dict[str, Any], decode: DeploymentHandle, *, listens: bool) -> None:
        assert listens
        self._diary = Diary(config["model"]["name"], "gateway")
        self._app_name = config["ray"]["app_name"]
        self._backend = DrainingBackend(_Backend(decode))
        self._drain_s = config["handoff"]["drain_s"]
        self._server = HttpServer(self._app())
        await self._server.start(config["gateway"]["host"], config["gateway"]["port"])
        self._entry = directory.entry_of_this_replica("gateway", metrics_address="127.0.0.1:4")
        await asyncio.to_thread(directory.register, self._entry)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/collect")
        async def collect(request: Request, mode: str = "short") -> Response:
            try:
                return JSONResponse(await unless_disconnected(request.receive, self._collect(mode)))
            except ShoalError as error:
                return JSONResponse({"param": error.param, "message": error.message}, error.http_status)

        @app.get("/stream")
        async def stream(mode: str = "short") -> Response:
            return _Watched(self._events(mode))

        @app.get("/replicas")
        async def replicas() -> list[str]:
            return [entry.role for entry in await asyncio.to_thread(directory.living, self._app_name)]

        return app

    async def _collect(self, mode: str) -> list[int]:
        return [token async for token in self._backend.generate(mode)]

    async def _events(self, mode: str) -> AsyncIterator[str]:
        try:
            async for token in self._backend.generate(mode):
                yield f"data: {token}\n\n"
        except ShoalError as error:
            yield f"data: {error.code}\n\n"

    async def drain(self) -> None:
        await self._backend.drain(self._drain_s)

    async def __del__(self) -> None:
        await asyncio.to_thread(directory.unregister, self._entry)
        await self._server.stop()
        self._diary.write("closed")
