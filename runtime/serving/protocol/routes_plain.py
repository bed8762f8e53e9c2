"""Routes for use with curl: they take image files and return JSON, pictures or arrays."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, Optional

import numpy as np
from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from PIL import Image

from ditf.runtime.drawing.heat_map import draw_heat_map, heat_colours
from ditf.runtime.drawing.matches import draw_matches
from ditf.runtime.matching.points import parse_points
from ditf.runtime.matching.soft_argmax import METHODS
from ditf.runtime.serving.decoding import decode_upload
from ditf.runtime.serving.http.gate import TICKET
from ditf.runtime.serving.service import Service

NPY = "application/x-npy"
PNG = "image/png"

Method = Literal["argmax", "window", "kernel"]
PointTexts = Annotated[
    list[str], Form(description="x,y in pixels of the source; several, or several in one with spaces between")
]
BundleText = Annotated[Optional[str], Form(description="Name of a bundle; the first one by default")]
PromptText = Annotated[Optional[str], Form(description="Condition of a bundle that has several")]


@dataclass
class Failure:
    """A failure: the problem, then the fix."""

    error: str


@dataclass
class Found:
    """Matches of N points.

    Attributes:
        points: the points of the request, [N, 2], (x, y) in pixels of the source.
        matches: [N, 2], (x, y) in pixels of the target.
        scores: [N], the cosines of the matches.
        source_size, target_size: the sizes (H, W) of both images in pixels.
    """

    bundle: str
    method: str
    points: list[list[float]]
    matches: list[list[float]]
    scores: list[float]
    source_size: list[int]
    target_size: list[int]


@dataclass
class ServedBundle:
    """A bundle that is served.

    Attributes:
        model, layer, precision: what it computes.
        size: the size (H, W) of the engine's input in pixels.
        grid: the size (h, w) of the features in cells.
        channels: the channels of a cell.
        batch: the number of images in a call; 0 stands for any number.
        conditions: the names that `prompt` can have, the default first.
        methods: the names that `method` can have, the default first.
        backend: the backend that runs it.
    """

    name: str
    model: Optional[str]
    layer: str
    precision: str
    size: list[int]
    grid: list[int]
    channels: int
    batch: int
    conditions: list[str]
    methods: list[str]
    backend: str


@dataclass
class Bundles:
    """The bundles that are served, the default first."""

    bundles: list[ServedBundle]


_FAILURES: dict[int | str, dict[str, object]] = {
    status: {"model": Failure, "description": text}
    for status, text in {
        400: "Something is wrong with the images, the points or an option",
        401: "An API key is needed",
        404: "No such bundle",
        408: "The body took too long",
        413: "Too large: the body, an image, or the number of points",
        422: "A field is missing or of another type",
        500: "The engine failed; the server's log says why",
        503: "Busy, or stopping: try again after Retry-After seconds",
        504: "The request waited too long",
    }.items()
}


def plain_routes(service: Service) -> APIRouter:
    """Make the routes over a service."""
    router = APIRouter(responses=_FAILURES)

    @router.get("/bundles", summary="What is served")
    async def bundles() -> Bundles:
        return Bundles([_describe(service, name) for name in service.models])

    @router.post(
        "/match",
        summary="Where points of one image are in another",
        response_model=Found,
        responses={200: {"content": {PNG: {}}}},
    )
    async def match(
        request: Request,
        source: Annotated[UploadFile, File(description="Image the points are in")],
        target: Annotated[UploadFile, File(description="Image to find them in")],
        points: PointTexts,
        method: Annotated[Method, Form()] = "argmax",
        bundle: BundleText = None,
        prompt: PromptText = None,
        format: Annotated[
            Optional[Literal["json", "png"]], Query(description="By default what Accept asks for, or json")
        ] = None,
    ) -> Response:
        name, ticket = service.bundle(bundle), request.scope["state"][TICKET]
        pictures = (await source.read(), await target.read())
        asked = parse_points([text for line in points for text in line.split()])
        found = await service.correspond(name, pictures, asked, prompt, method, ticket)
        if format == "png" or (format is None and PNG in request.headers.get("accept", "")):
            limits = service.limits
            return Response(
                await service.aside(
                    "draw",
                    lambda: _png(
                        draw_matches(
                            decode_upload(pictures[0], limits),
                            decode_upload(pictures[1], limits),
                            found.points,
                            found.matches,
                        )
                    ),
                    ticket,
                ),
                media_type=PNG,
            )
        answer = Found(
            name,
            method,
            found.points.tolist(),
            found.matches.points.tolist(),
            found.matches.scores.tolist(),
            list(found.source_size),
            list(found.target_size),
        )
        return JSONResponse(asdict(answer))

    @router.post(
        "/heat-map",
        summary="Cosine of a point with every pixel of another image",
        response_class=Response,
        responses={200: {"content": {PNG: {}, NPY: {}}}},
    )
    async def heat_map(
        request: Request,
        source: Annotated[UploadFile, File(description="Image the point is in")],
        target: Annotated[UploadFile, File(description="Image to look for it in")],
        point: Annotated[str, Form(description="x,y in pixels of the source")],
        bundle: BundleText = None,
        prompt: PromptText = None,
        format: Annotated[
            Optional[Literal["png", "npy"]],
            Query(description="A picture, or float32 [H, W]; by default what Accept asks for, or png"),
        ] = None,
        view: Annotated[
            Literal["pair", "target"],
            Query(description="Of the picture: both images, or the colours alone, to lay over the target"),
        ] = "pair",
    ) -> Response:
        name, ticket = service.bundle(bundle), request.scope["state"][TICKET]
        pictures = (await source.read(), await target.read())
        [asked] = parse_points([point])
        heat = await service.heat_map(name, pictures, asked, prompt, ticket)
        if format == "npy" or (format is None and NPY in request.headers.get("accept", "")):
            return Response(await service.aside("encode", lambda: _npy(heat), ticket), media_type=NPY)
        if view == "target":
            colours, low, high = await service.aside("draw", lambda: heat_colours(heat), ticket)
            headers = {"X-Cosine-Low": f"{low:.6f}", "X-Cosine-High": f"{high:.6f}"}
            png = await service.aside("encode", lambda: _png(colours), ticket)
            return Response(png, media_type=PNG, headers=headers)
        limits = service.limits
        return Response(
            await service.aside(
                "draw",
                lambda: _png(
                    draw_heat_map(
                        decode_upload(pictures[0], limits), decode_upload(pictures[1], limits), asked, heat
                    )
                ),
                ticket,
            ),
            media_type=PNG,
        )

    @router.post(
        "/features",
        summary="Features of an image: .npy, [C, h, w]",
        response_class=Response,
        responses={200: {"content": {NPY: {}}}},
    )
    async def features(
        request: Request,
        image: Annotated[UploadFile, File(description="Image of any size")],
        bundle: BundleText = None,
        prompt: PromptText = None,
    ) -> Response:
        name, ticket = service.bundle(bundle), request.scope["state"][TICKET]
        [found] = await service.features(name, [await image.read()], prompt, ticket)
        height, width = found.image_size
        headers = {
            "X-Image-Size": f"{height}x{width}",
            "X-Covered-Cells": "x".join(f"{length:g}" for length in found.cells),
        }
        return Response(
            await service.aside("encode", lambda: _npy(found.array), ticket), media_type=NPY, headers=headers
        )

    return router


def _describe(service: Service, name: str) -> ServedBundle:
    model = service.models[name]
    manifest = model.manifest
    return ServedBundle(
        name=name,
        model=manifest.model["id"],
        layer=manifest.layer_name,
        precision=manifest.precision,
        size=list(manifest.size),
        grid=list(manifest.grid),
        channels=manifest.channels,
        batch=0 if manifest.batch == "dynamic" else manifest.batch,
        conditions=list(model.conditions),
        methods=list(METHODS),
        backend=model.detail,
    )


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
