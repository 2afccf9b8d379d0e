"""vLLM's own split into prefill and decode: two of its servers that hand K/V over by NixlConnector, and a proxy.

    python tests/benchmarks/vllm_pair.py --port 8100 --prefill-cores 0 --decode-cores 1 -- VLLM_COMMAND...

The proxy asks the prefill server for one token, which says where the prompt's K/V lie, and gives that to the decode
server with the same request; whose events go to the client as they come. A prompt whose K/V aren't handed over is an
error, so that none is computed twice unseen. This ends when one of the servers does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp import web

from shoal.cluster.ports import free_port

_END_WITHIN_S = 20.0
_CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "fail",
}
_HAND_OVER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Server:
    """One of the two; ``cores`` are those that its threads are bound to."""

    def __init__(self, command: list[str], cores: str) -> None:
        self.port = free_port("127.0.0.1")
        self._command = [*command, "--port", str(self.port), "--kv-transfer-config", json.dumps(_CONNECTOR)]
        self._environment = {
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port("127.0.0.1")),
            "UCX_NET_DEVICES": "lo",
        }
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        self._process = await asyncio.create_subprocess_exec(*self._command, env=self._environment)
        return await self._process.wait()

    async def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_WITHIN_S)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class Proxy:
    def __init__(self, prefill: Server, decode: Server, session: aiohttp.ClientSession) -> None:
        self._prefill, self._decode, self._session = prefill, decode, session

    async def health(self, request: web.Request) -> web.Response:
        for server in (self._prefill, self._decode):
            try:
                async with self._session.get(server.url("/health")) as answer:
                    if answer.status != 200:
                        return web.Response(status=503)
            except aiohttp.ClientError:
                return web.Response(status=503)
        return web.Response()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        try:
            where = await self._where(body)
            return await self._stream(request, {**body, "kv_transfer_params": where})
        except aiohttp.ClientError as error:
            return web.json_response({"error": {"message": f"{type(error).__name__}: {error}"}}, status=502)

    async def _where(self, body: dict[str, Any]) -> dict[str, Any]:
        """Prefill's prompt, computed; what comes back is for decode."""
        first = {name: value for name, value in body.items() if name != "stream_options"}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": _HAND_OVER}
        async with self._session.post(self._prefill.url("/v1/completions"), json=first) as answer:
            document = await answer.json()
        where: dict[str, Any] | None = document.get("kv_transfer_params")
        if not where:
            raise aiohttp.ClientError(f"prefill handed nothing over: {document}")
        return where

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        async with self._session.post(self._decode.url("/v1/completions"), json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response


async def _serve(options: argparse.Namespace) -> int:
    """How it ended: 0 if it was told to, else 1."""
    prefill = Server(options.command, options.prefill_cores)
    decode = Server(options.command, options.decode_cores)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        proxy = Proxy(prefill, decode, session)
        app = web.Application(client_max_size=16 << 20)
        app.add_routes([web.get("/health", proxy.health), web.post("/v1/completions", proxy.completions)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        servers = [asyncio.create_task(server.run()) for server in (prefill, decode)]
        told = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait([*servers, told], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await asyncio.gather(prefill.stop(), decode.stop())
            await runner.cleanup()
        return 0 if told.done() else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill-cores", metavar="CORES", required=True, help="such as 0,1")
    parser.add_argument("--decode-cores", metavar="CORES", required=True)
    parser.add_argument("command", nargs="+", metavar="VLLM_COMMAND", help="starts a server, but for its port")
    sys.exit(asyncio.run(_serve(parser.parse_args())))


if __name__ == "__main__":
    main()
