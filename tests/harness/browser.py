"""A page in headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--window-size=1000,700",
    "--remote-debugging-port=0", "about:blank",
)  # fmt: skip


class Page:
    """An open page; `chromium` of Debian has software rendering."""

    def __init__(self, session: Any, socket: Any) -> None:
        self._session, self._socket, self._number = session, socket, 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def screenshot(self, path: Path) -> None:
        """Write what the page shows as a PNG file."""
        result = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Start Chromium with a profile in a folder; yield the WebSocket of its page."""
    process = subprocess.Popen(
        ["chromium", f"--user-data-dir={folder}", *ARGUMENTS], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "DevTools listening" in line)
        with urllib.request.urlopen(f"http://{urlsplit(address).netloc}/json") as answer:
            targets = json.load(answer)
        yield next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
    finally:
        process.kill()
        process.communicate()
