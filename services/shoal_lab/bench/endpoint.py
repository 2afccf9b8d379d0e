"""An OpenAI endpoint over HTTP: which models it has, and one streamed request from its first byte to its last.

Who asks often shares the server's cores, so the client must be light: aiohttp reads HTTP in C.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import aiohttp
from yarl import URL

from shoal.errors import ConfigError, Unavailable
from shoal_lab.bench.answer import MAX_DETAIL_CHARS, Answer, RequestFailed, encodable, error_message
from shoal_lab.bench.clock import Clock
from shoal_lab.bench.record import Failure, Record
from shoal_lab.bench.sse import EventDecoder
from shoal_lab.bench.workload import PlannedRequest, PromptKind

_MAX_ERROR_BYTES = 65_536
# Shorter than servers' usual 5 s: a connection that the server closes while we send would look like its failure.
_KEEPALIVE_S = 3.0
# Behind [DONE] comes the end of HTTP's body, after which the connection can be used again. A server that doesn't end it
# isn't waited for.
_END_WITHIN_S = 0.5
_ERRNO = re.compile(r"\[Errno ([0-9]+)\]")


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """``extra_body`` is merged over each request's body. ``timeout_s`` is what one request has in all, and it
    ``tells_timeout`` to a server of Shoal."""

    url: str
    model: str | None = None
    prompts: PromptKind = PromptKind.IDS
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout_s: float = 120.0
    tells_timeout: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"a timeout of {self.timeout_s:g} s: --timeout-s must be more than 0, and finite")


class Endpoint:
    """Use ``open_endpoint``. Nothing here is retried."""

    def __init__(self, options: EndpointOptions, model: str, http: aiohttp.ClientSession, clock: Clock) -> None:
        self.model = model
        self._options, self._http, self._clock = options, http, clock
        self._path = "chat/completions" if options.prompts is PromptKind.CHAT else "completions"

    def body(self, request: PlannedRequest) -> bytes:
        """What is posted. Made before the request is due, so that its making delays nothing."""
        if self._options.prompts is PromptKind.CHAT:
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": request.prompt}]}
        else:
            prompt = {"prompt": request.prompt}
        document = {
            "model": self.model,
            **prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self._options.ignore_eos else {}),
            **self._options.extra_body,
        }
        return json.dumps(document).encode()

    async def send(self, request: PlannedRequest, body: bytes, origin_s: float) -> Record:
        """``origin_s`` is the load's start by the clock. Whatever goes wrong is in the record."""
        answer, failed = Answer(), None
        sent_s = self._clock.now()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._exchange(body, answer)
        except RequestFailed as error:
            failed = error
        except TimeoutError:
            if not answer.is_done:
                failed = RequestFailed(Failure.TIMEOUT, f"not done after {self._options.timeout_s:g} s")
        return Record(
            index=request.index,
            kind=request.kind,
            is_counted=request.is_counted,
            planned_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            arrival_s=request.arrival_s,
            sent_s=round(sent_s - origin_s, 6),
            ttft_s=_between(sent_s, answer.first_s),
            e2e_s=_between(sent_s, answer.last_s) if failed is None else None,
            itl_s=tuple(round(gap, 6) for gap in answer.gaps_s),
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens,
            tokens_from=answer.tokens_from,
            failure=failed.failure if failed else None,
            status=answer.status,
            detail=failed.detail if failed else "",
        )

    async def _exchange(self, body: bytes, answer: Answer) -> None:
        """Fill ``answer``. Raises RequestFailed."""
        try:
            # In one piece, aiohttp would warn of a large one.
            async with self._http.post(self._path, data=BytesIO(body), allow_redirects=False) as response:
                answer.status = response.status
                await _refuse_all_but_streams(response)
                parts = response.content.iter_any()
                await self._read(parts, answer)
                if not answer.is_done:
                    raise RequestFailed(Failure.BROKEN_STREAM, "the stream ended without [DONE]")
                if answer.last_s is None:
                    raise RequestFailed(Failure.NO_TOKENS, "the stream had no token")
                await _pass_over(parts)
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed(Failure.UNREACHABLE, f"no connection: {_cause(error)}") from error
        except aiohttp.ClientError as error:
            # What comes after [DONE] is no longer part of the answer.
            if not answer.is_done:
                failure = Failure.DISCONNECTED if answer.status is None else Failure.BROKEN_STREAM
                raise RequestFailed(failure, f"the connection was lost: {error}") from error

    async def _read(self, parts: AsyncIterator[bytes], answer: Answer) -> None:
        """Up to [DONE], or the end."""
        events = EventDecoder()
        async for data in parts:
            now_s = self._clock.now()
            for event in events.feed(data):
                answer.add(event, now_s)
                if answer.is_done:
                    return
        now_s = self._clock.now()
        for event in events.close():
            answer.add(event, now_s)


@asynccontextmanager
async def open_endpoint(options: EndpointOptions, clock: Clock) -> AsyncIterator[Endpoint]:
    """Connections are as many as requests run at once, and go straight to the endpoint, past proxies.

    Without a model in ``options``, the first that the endpoint lists is asked. Raises ConfigError or Unavailable.
    """
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if options.api_key is not None:
        headers["authorization"] = f"Bearer {options.api_key}"
    if options.tells_timeout:
        headers["x-shoal-timeout"] = str(options.timeout_s)
    url = base_url(options.url)
    async with aiohttp.ClientSession(
        url,
        headers=headers,
        timeout=aiohttp.ClientTimeout(None),  # the whole request has one, around it
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=ssl.create_default_context()),
        trust_env=False,
    ) as http:
        model = options.model or await _first_model(http, f"{url}models", options.timeout_s)
        yield Endpoint(options, model, http, clock)


def base_url(url: str) -> str:
    """With ``/v1/`` at its end, whether that was typed or not. Raises ConfigError, which tells no password."""
    if "@" in url:
        raise ConfigError(
            "the URL has an @, as there is behind a user name or a password: leave them out, since the report tells "
            "the URL (a key comes by --api-key-env); an @ of a path is written %40"
        )
    try:
        parsed = URL(url)
    except ValueError as error:
        raise ConfigError(f"{url} is no URL ({error}): write one like http://127.0.0.1:8000") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.query_string or parsed.fragment:
        raise ConfigError(f"{url} isn't the URL of an endpoint: write one like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1") + "/v1/"


async def _first_model(http: aiohttp.ClientSession, url: str, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s), http.get("models") as response:
            text = await response.text(errors="replace")
    except TimeoutError:
        raise Unavailable(f"{url} doesn't answer within {timeout_s:g} s: is this the right address?") from None
    except aiohttp.ClientError as error:
        next_step = "start the server first, or correct the URL"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            next_step = "name the file of the CA that signed its certificate in SSL_CERT_FILE"
        raise Unavailable(f"can't reach {url} ({_cause(error)}): {next_step}") from None
    try:
        if response.ok:
            return encodable(str(json.loads(text)["data"][0]["id"]))
    except (ValueError, LookupError, TypeError):
        pass
    said = f"HTTP {response.status}, {text[:MAX_DETAIL_CHARS]!r}"
    raise ConfigError(f"{url} lists no models ({said}): name one by --model; if it wants a key, say --api-key-env")


async def _refuse_all_but_streams(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        failure = Failure.REJECTED if response.status in {429, 503} else Failure.HTTP_ERROR
        raise RequestFailed(failure, await _said(response))
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise RequestFailed(Failure.MALFORMED, f"no event stream, but {kind or 'something'}: {await _said(response)}")


async def _said(response: aiohttp.ClientResponse) -> str:
    """Why there is no answer, in the endpoint's words."""
    data = b""
    async for part in response.content.iter_any():
        data += part
        if len(data) > _MAX_ERROR_BYTES:
            break
    text = data[:_MAX_ERROR_BYTES].decode("utf-8", errors="replace")
    try:
        return error_message(json.loads(text))
    except (ValueError, RecursionError):
        return text


async def _pass_over(parts: AsyncIterator[bytes]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_WITHIN_S):
            async for _ in parts:
                pass


def _cause(error: BaseException) -> str:
    """What the system said in the first place, of each address that the endpoint's name has."""
    said = str(getattr(error, "os_error", error))
    numbers = dict.fromkeys(map(int, _ERRNO.findall(said)))
    return ", ".join(map(os.strerror, numbers)) or said or type(error).__name__


def _between(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)
