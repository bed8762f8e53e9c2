"""Serving the web page's files. They are read once, and no path from a request is ever opened."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from fastapi import FastAPI, Request, Response

FOLDER = Path(__file__).parent / "static"

_INDEX = "/index.html"


def read_page(folder: Path = FOLDER) -> dict[str, tuple[bytes, str]]:
    """Read a folder's files: {path in a URL: (content, media type)}. index.html is also served at `/`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            files[f"/{path.relative_to(folder).as_posix()}"] = (path.read_bytes(), kind)
    if _INDEX in files:
        files["/"] = files[_INDEX]
    return files


def add_page(app: FastAPI, files: dict[str, tuple[bytes, str]]) -> None:
    """Add routes that serve the files. Call this last, so that they hide no other route."""

    async def page(request: Request) -> Response:
        content, kind = files[request.scope["path"]]
        return Response(content, media_type=kind)

    for path in files:
        app.add_route(path, page, methods=["GET"], include_in_schema=False)
