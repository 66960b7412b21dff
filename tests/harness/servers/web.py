"""A web server for tests: files of a folder on a free loopback port, with a server's habits."""

import functools
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Habits:
    """How a server answers. It redirects `/moved/PATH` to `/PATH`.

    missing     status for files that do not exist
    refused     requests for a path that contains this text get the status 403
    ranges      whether it sends parts of files
    """

    missing: int = 404
    refused: str | None = None
    ranges: bool = True
    paths: list[str] = field(default_factory=list)


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, habits: Habits, *arguments: object, **named: object) -> None:
        self.habits = habits
        super().__init__(*arguments, **named)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        self.habits.paths.append(self.path)
        if self.path.startswith("/moved/"):
            self._send(HTTPStatus.FOUND, b"", has_body, Location=self.path.removeprefix("/moved"))
            return
        if self.habits.refused is not None and self.habits.refused in self.path:
            self._send(403, b"", has_body)
            return
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self._send(self.habits.missing, b"", has_body)
            return
        content = file.read_bytes()
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if requested is None or not self.habits.ranges:
            self._send(200, content, has_body)
            return
        first, last = requested.groups()
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            self._send(416, b"", has_body)
            return
        place = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], has_body, **{"Content-Range": place})

    def _send(self, status: int, content: bytes, has_body: bool, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(handler: Any, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Answer requests on a free loopback port with a request handler; yield the URL.

    `tls` are the files of a certificate and its key, for https.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def web_server(
    folder: Path, habits: Habits | None = None, tls: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """Serve the files of a folder, with `tls` by https; yield the server's URL."""
    handler = functools.partial(Handler, habits or Habits(), directory=str(folder))
    with serving(handler, tls) as url:
        yield url
