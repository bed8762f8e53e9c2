"""The Open Inference Protocol's routes, as Triton and KServe serve them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

import ditf
from ditf.runtime.backends import BACKENDS
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.soft_argmax import METHODS
from ditf.runtime.serving.errors import NotFound
from ditf.runtime.serving.http.gate import TICKET
from ditf.runtime.serving.jobs import Ticket
from ditf.runtime.serving.protocol.contract import (
    METHOD,
    PROMPT,
    SERVED_CORRESPOND,
    SERVED_FEATURES,
    SERVED_MATCH,
    VERSION,
    ModelSpec,
    Results,
    model_specs,
)
from ditf.runtime.serving.protocol.json_numbers import MEMORY, TEXT
from ditf.runtime.serving.protocol.v2 import (
    InferRequest,
    encode_response,
    inflate,
    json_length,
    parse_request,
)
from ditf.runtime.serving.service import Service

HEALTH_PATHS = LIVE, READY = "/v2/health/live", "/v2/health/ready"

_HEADER_LENGTH = "Inference-Header-Content-Length"
_EXTENSIONS = ["binary_tensor_data", "parameters"]


class V2Routes:
    """The protocol over a service.

    A bundle's models are `<bundle>.features`, `<bundle>.match` and `<bundle>.correspond`; the first bundle's
    are also called without its name.

    Args:
        ready: returns whether requests are let in.
    """

    def __init__(self, service: Service, ready: Callable[[], bool]) -> None:
        self._service = service
        self._ready = ready
        self._models: dict[str, tuple[str, ModelSpec]] = {}
        for bundle, model in service.models.items():
            for name, spec in model_specs(model.manifest).items():
                self._models[f"{bundle}.{name}"] = (bundle, spec)
                if bundle == service.default:
                    self._models[name] = (bundle, spec)

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return list(self._models)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes. They are left out of the OpenAPI document, because the protocol has its own."""
        model = "/v2/models/{model}"
        routes: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
            (LIVE, self.live, "GET"),
            (READY, self.ready, "GET"),
            ("/v2", self.server_metadata, "GET"),
            (model, self.model_metadata, "GET"),
            (f"{model}/versions/{{version}}", self.model_metadata, "GET"),
            (f"{model}/ready", self.model_ready, "GET"),
            (f"{model}/versions/{{version}}/ready", self.model_ready, "GET"),
            (f"{model}/infer", self.infer, "POST"),
            (f"{model}/versions/{{version}}/infer", self.infer, "POST"),
        ]
        for path, endpoint, method in routes:
            app.add_route(path, endpoint, methods=[method], include_in_schema=False)

    async def live(self, request: Request) -> Response:
        alive = self._service.worker.alive
        return JSONResponse({"live": alive}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        ready = self._ready() and self._service.worker.alive
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": "ditf", "version": ditf.__version__, "extensions": _EXTENSIONS})

    async def model_metadata(self, request: Request) -> Response:
        name, bundle, spec = self._found(request)
        platform = BACKENDS[self._service.models[bundle].backend].platform
        return JSONResponse(
            {
                "name": name,
                "versions": [VERSION],
                "platform": platform if spec.name == SERVED_FEATURES else "ditf",
                "inputs": [asdict(tensor) for tensor in spec.inputs],
                "outputs": [asdict(tensor) for tensor in spec.outputs],
            }
        )

    async def model_ready(self, request: Request) -> Response:
        name, _, _ = self._found(request)
        ready = self._ready()
        return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        name, bundle, spec = self._found(request)
        body = body_in = await request.body()
        limits = self._service.limits
        headers = request.headers

        encoding = headers.get("Content-Encoding", "").lower()
        ticket: Ticket = request.scope["state"][TICKET]
        if encoding:
            body = await self._service.aside(
                "inflate", lambda: inflate(body_in, encoding, limits.body_bytes), ticket
            )
            ticket.hold(len(body))
        header_length = headers.get(_HEADER_LENGTH)
        ticket.hold(MEMORY * min(json_length(len(body), header_length), limits.json_bytes))
        asked = await self._service.aside(
            "parse", lambda: parse_request(body, header_length, spec, limits.json_bytes), ticket
        )
        if asked.timeout_s is not None:
            ticket = replace(ticket, deadline=min(ticket.deadline, time.monotonic() + asked.timeout_s))
        results = await _RUN[spec.name](self._service, bundle, asked, ticket)
        ticket.hold(sum(TEXT * results[name].size for name, binary in asked.outputs if not binary))
        content, json_bytes = await self._service.aside(
            "encode", lambda: encode_response(name, VERSION, asked, results), ticket
        )
        if json_bytes is None:
            return Response(content, media_type="application/json")
        return Response(
            content, media_type="application/octet-stream", headers={_HEADER_LENGTH: str(json_bytes)}
        )

    def _found(self, request: Request) -> tuple[str, str, ModelSpec]:
        """The name, bundle and tensors of the model that a path names.

        Raises:
            NotFound: there is no such model.
        """
        name, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if name not in self._models:
            raise NotFound(f"no model {name!r:.80} is served", f"there is {', '.join(self._models)}")
        if version != VERSION:
            raise NotFound(f"{name} has no version {version!r:.40}", f"its version is {VERSION}")
        return name, *self._models[name]


async def _features(service: Service, bundle: str, asked: InferRequest, ticket: Ticket) -> Results:
    images = asked.inputs["image"]
    if not len(images):
        raise InputError("image has no images")
    maps = await service.features(bundle, list(images), asked.parameters.get(PROMPT), ticket)
    stacked = await service.aside("encode", lambda: np.stack([one.array for one in maps]), ticket)
    return {"features": stacked}


async def _match(service: Service, bundle: str, asked: InferRequest, ticket: Ticket) -> Results:
    sides = []
    for name in ("source", "target"):
        height, width = (int(length) for length in asked.inputs[f"{name}_size"])
        if not (0 < height < 1 << 20 and 0 < width < 1 << 20):
            raise InputError(f"{name}_size is {height}, {width}", "it is (height, width) in pixels")
        sides.append(FeatureMap(asked.inputs[name], (height, width)))
    method = asked.parameters.get(METHOD, METHODS[0])
    found = await service.match(bundle, sides[0], sides[1], asked.inputs["points"], method, ticket)
    return {"matches": found.points, "scores": found.scores}


async def _correspond(service: Service, bundle: str, asked: InferRequest, ticket: Ticket) -> Results:
    found = await service.correspond(
        bundle,
        (asked.inputs["source"], asked.inputs["target"]),
        asked.inputs["points"],
        asked.parameters.get(PROMPT),
        asked.parameters.get(METHOD, METHODS[0]),
        ticket,
    )
    return {"matches": found.matches.points, "scores": found.matches.scores}


_RUN: dict[str, Callable[[Service, str, InferRequest, Ticket], Awaitable[Results]]] = {
    SERVED_FEATURES: _features,
    SERVED_MATCH: _match,
    SERVED_CORRESPOND: _correspond,
}
