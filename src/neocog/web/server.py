"""``neocog explain --serve``: the page, and every exact number when it is asked for.

Listens on this machine only, and answers three kinds of requests:

    /                     the page
    /map/BOX              the values of a box, float32, little-endian
    /kernel/BOX/CHANNEL   the weights of one output channel of a convolution or linear layer
"""

from __future__ import annotations

import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from .. import network as net
from ..scenes import Scene
from .page import Page
from .payload import map_of

_REQUEST = re.compile(r"/(?:(map)/([0-9]{1,9})|(kernel)/([0-9]{1,9})/([0-9]{1,9}))?")
"""Nine digits are more than there are boxes or channels; int() refuses thousands of them."""

PATIENCE = 30
"""Seconds that a connection may be silent for; each one has a thread of its own."""


class Server(ThreadingHTTPServer):
    """Serves one page; ``port`` 0 takes a free one. ``url`` is where it is."""

    daemon_threads = True

    def __init__(self, page: Page, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.page, self.document = page, page.html().encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who leaves before the answer is complete is nobody to tell about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        # Only under its own name: a page elsewhere must not reach it through a name of its own.
        if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        found = _REQUEST.fullmatch(self.path)
        body = None
        if found is not None:
            body = self.server.document if self.path == "/" else _numbers(self.server.page, found)
        if body is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind = "text/html; charset=utf-8" if self.path == "/" else "application/octet-stream"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a line for each number would bury what the command says."""


def _numbers(page: Page, found: re.Match[str]) -> bytes | None:
    scene: Scene = page.scene
    index = int(found.group(2) or found.group(4))
    if index >= len(scene.boxes):
        return None
    box = scene.boxes[index]
    if found.group(1):
        values = map_of(box)
        return None if values is None else values.astype("<f4").tobytes()
    channel = int(found.group(5))
    if not isinstance(box.op, net.Convolution | net.Linear):
        return None
    kernel = scene.parameters[box.op.weight]
    if channel >= kernel.shape[0]:
        return None
    return np.asarray(kernel[channel].float().cpu().numpy()).astype("<f4").tobytes()
