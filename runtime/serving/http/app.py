"""Assembling the web application: the routes, errors as JSON, and the gate around them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

import ditf
from ditf.runtime.errors import DitfError
from ditf.runtime.serving.errors import Overloaded, status_of
from ditf.runtime.serving.http.gate import RequestGate
from ditf.runtime.serving.http.metrics import CONTENT_TYPE, ServerMetrics
from ditf.runtime.serving.http.page import add_page, read_page
from ditf.runtime.serving.protocol.routes_plain import plain_routes
from ditf.runtime.serving.protocol.routes_v2 import HEALTH_PATHS, V2Routes
from ditf.runtime.serving.service import Service

_DESCRIPTION = (
    "Dense visual correspondence from Diffusion Transformers. The Open Inference Protocol is at /v2, for"
    " example with tritonclient; these routes are for image files."
)


def make_app(
    service: Service, metrics: ServerMetrics, api_key: str | None = None, hosts: Collection[str] | None = None
) -> RequestGate:
    """Make the ASGI application of a service.

    Args:
        service: the service.
        metrics: the service's observer.
        api_key, hosts: see `RequestGate`.
    """
    MultiPartParser.spool_max_size = service.limits.body_bytes  # bodies are already in memory
    app = FastAPI(
        title="ditf",
        version=ditf.__version__,
        description=_DESCRIPTION,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            DitfError: _expected,
            RequestValidationError: _invalid,
            HTTPException: _http,
        },
    )
    page = read_page()
    v2 = V2Routes(service, lambda: not gate.draining)
    gate = RequestGate(app, service.limits, metrics, api_key, HEALTH_PATHS, page, hosts)

    async def prometheus(request: Request) -> Response:
        text = metrics.text(
            queue_depth=service.worker.waiting,
            engine_busy=service.worker.running,
            requests_in_flight=gate.in_flight,
            buffered_bytes=gate.buffered,
            cache_bytes=service.cache.bytes,
            cache_images=len(service.cache),
        )
        return Response(text, headers={"content-type": CONTENT_TYPE})

    v2.add_to(app)
    app.include_router(plain_routes(service))
    app.add_route("/metrics", prometheus, methods=["GET"], include_in_schema=False)
    add_page(app, page)
    return gate


async def _expected(request: Request, error: Any) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Overloaded) else None
    return JSONResponse({"error": " ".join(str(error).split())}, status_of(error), headers)


async def _invalid(request: Request, error: Any) -> Response:
    problems = "; ".join(
        f"{'.'.join(map(str, one['loc'][1:])) or one['loc'][0]}: {one['msg']}" for one in error.errors()[:8]
    )
    return JSONResponse({"error": problems}, 422)


async def _http(request: Request, error: Any) -> Response:
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)
