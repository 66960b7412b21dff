"""Server of a viewer on the loopback address: data below a random path, and the viewer's page."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from chunkq_producer.view.served import Served

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
TOKEN_BYTES = 16
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
BYTES = "application/octet-stream"


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on the loopback address. Port 0 is a free one.

    Raises OSError if the port cannot be used.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((HOST, port))
        server.listen()  # a browser that comes before `serve` waits
    except OSError:
        server.close()
        raise
    return server


def new_token() -> str:
    """Return a path that nobody can guess."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def application(token: str, served: Mapping[str, Served]) -> Starlette:
    """Return the application that serves objects as `/TOKEN/SOURCE/OBJECT`.

    Every page may read them, because none can guess the token.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    def respond(request: Request) -> Response:
        parameters = request.path_params
        source = served.get(parameters["source"])
        # Compared as bytes: a text with other letters than ASCII is an error.
        is_known = secrets.compare_digest(parameters["token"].encode(), token.encode())
        if source is None or not is_known:
            return Response(status_code=404)
        return _response(source, parameters["name"], request.headers.get("range"))

    cors = Middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "HEAD"],
        allow_headers=["*"],
        expose_headers=["Accept-Ranges", "Content-Length", "Content-Range"],
    )
    # Pages of other hosts cannot reach the server under a name of their own.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    route = Route("/{token}/{source}/{name:path}", respond, methods=["GET", "HEAD"])
    return Starlette(routes=[route], middleware=[hosts, cors])


def _response(source: Served, name: str, requested: str | None) -> Response:
    """Return an object, or the part of it that is requested."""
    from starlette.responses import FileResponse, Response

    path = source.path(name)
    if path is not None:
        return FileResponse(path)  # it answers requests of parts itself
    content = source.content(name)
    if content is None:
        return Response(status_code=404)
    headers = {"Accept-Ranges": "bytes"}
    match = RANGE.fullmatch(requested or "")
    if match is None or not any(match.groups()):
        return Response(content, headers=headers, media_type=BYTES)
    first, last = match.groups()
    size = len(content)
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(content[start:stop], 206, headers=headers, media_type=BYTES)


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve until the process is interrupted."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])
