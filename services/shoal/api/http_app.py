"""The HTTP API: routes, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

import shoal
from shoal.api.access import KeyGuard
from shoal.api.edge import RequestEdge
from shoal.api.endpoint import chat_completions, completions
from shoal.api.intake import Services
from shoal.api.openapi import openapi_document
from shoal.api.refusals import MethodNotAllowed, RouteNotFound, error_response
from shoal.api.tokenizing import Detokenize, Tokenize
from shoal.api.validation import ServedModel, find_model
from shoal.errors import InternalError, RequestError, ShoalError, Unavailable

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def _no_targets() -> list[Any]:
    return []


def create_app(
    services: Services,
    *,
    metrics_text: Callable[[], bytes | str] = bytes,
    metrics_targets: Callable[[], Awaitable[list[Any]]] = _no_targets,
    proxy_echoes_id: bool = False,
) -> FastAPI:
    """The gateway as an ASGI application; works under uvicorn and as an ingress of Ray Serve.

    ``metrics_text`` gives this process' metrics in Prometheus' text format, ``metrics_targets`` the document of
    Prometheus' HTTP service discovery. With ``proxy_echoes_id``, whoever stands before it puts ``x-request-id`` into
    the answers already.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        services.tokenizer.close()

    app = FastAPI(title="Shoal", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(KeyGuard, access=services.access)
    app.add_middleware(RequestEdge, proxy_echoes_id=proxy_echoes_id)
    app.add_exception_handler(HTTPException, _routing_error)
    app.router.routes += [
        Route("/v1/completions", completions(services), methods=["POST"]),
        Route("/v1/chat/completions", chat_completions(services), methods=["POST"]),
        Route("/tokenize", Tokenize("tokenize", services), methods=["POST"]),
        Route("/detokenize", Detokenize("detokenize", services), methods=["POST"]),
    ]
    _add_models(app, services.models)
    _add_health(app, services)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(services.tokenizer.about)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(metrics_text(), headers={"content-type": METRICS_MEDIA_TYPE})

    @app.get("/metrics/targets")
    async def targets() -> Response:
        return JSONResponse(await metrics_targets())

    document = lru_cache(1)(partial(openapi_document, services))  # it takes a while, and stays the same

    @app.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return JSONResponse(document(request.scope.get("root_path", "")))

    return app


def _add_models(app: FastAPI, models: tuple[ServedModel, ...]) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_document(model) for model in models]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        if not name:  # the list's address, and a slash
            return await list_models()
        return JSONResponse(_model_document(find_model(models, name)))


def _add_health(app: FastAPI, services: Services) -> None:
    @app.get("/health")
    async def health() -> Response:
        """This process answers, and all of its threads and servers work."""
        try:
            services.require_healthy()
        except ShoalError as error:
            return error_response(error)
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def ready() -> Response:
        """Somebody behind it does, too."""
        try:
            now = await services.readiness()
        except ShoalError as error:
            return error_response(error)
        document = {"status": now.status, "num_decode": now.num_decode, "num_prefill": now.num_prefill}
        if now.is_ready:
            return JSONResponse(document)
        refusal = error_response(Unavailable("no decode replica is ready: try again in a moment"))
        return JSONResponse(document, status_code=503, headers={"retry-after": refusal.headers["retry-after"]})

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": shoal.__version__})


def _model_document(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "shoal",
        "max_model_len": model.max_context_tokens,
    }


async def _routing_error(request: Request, error: Exception) -> Response:
    """What the framework refuses itself, in our shape."""
    if not isinstance(error, HTTPException):
        return error_response(InternalError(str(error)))
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            return error_response(RouteNotFound(_nowhere(request)), headers)
        case 405:
            return error_response(MethodNotAllowed(f"{request.method} isn't allowed here"), headers)
    return error_response(RequestError(str(error.detail)), headers)


def _nowhere(request: Request) -> str:
    """What is said of a path that isn't there; most often a client's base URL lacks its end."""
    path = request.url.path.removeprefix(request.scope.get("root_path", "").rstrip("/"))
    is_there = any(isinstance(route, Route) and route.path == f"/v1{path}" for route in request.app.routes)
    hint = ": the API is under /v1, which the client's base URL must end with" if is_there else ""
    return f"there is no {request.url.path[:200]} here{hint}"
