"""A fake of a Ray dashboard on a real port: its answers are written by Ray's own functions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ray.autoscaler._private.util import parse_usage
from ray.dashboard.routes import rest_response

GIB = 1 << 30


@dataclass
class FakeDashboard:
    """Nodes by their ids, each with what is used of each resource and how much there is.

    Args:
        usage: what Ray's autoscaler knows of the nodes; of those that it leaves out nothing.
        token: what a client must show.
    """

    nodes: Mapping[str, Mapping[str, tuple[float, float]]]
    usage: Mapping[str, Any] | None = None
    token: str | None = None
    headers: list[dict[str, str]] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str) -> bytes:
        if path == "/api/version":
            return b'{"version": "4", "ray_version": "2.60.0"}'
        assert path == "/nodes?view=summary", path
        usage = self.usage
        if usage is None:
            usage = {node: "\n".join(parse_usage(dict(used), verbose=True)) for node, used in self.nodes.items()}
        body = rest_response(
            status_code=HTTPStatus.OK,
            message="Node summary fetched.",
            summary=[_node(node, used) for node, used in self.nodes.items()] + [{"raylet": {"state": "DEAD"}}],
            node_logical_resources=usage,
        ).body
        assert isinstance(body, bytes)
        return body


def _node(name: str, used: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    total = {kind: amount for kind, (_, amount) in used.items() if "_group_" not in kind}
    return {
        "ip": name,
        "mem": [64 * GIB, 32 * GIB, 50.0, 32 * GIB],
        "gpus": [],
        "raylet": {"state": "ALIVE", "resourcesTotal": total},
    }


@contextlib.contextmanager
def answering(dashboard: FakeDashboard) -> Iterator[FakeDashboard]:
    """Within it the dashboard answers at its `address`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            dashboard.headers.append(dict(self.headers))
            given = self.headers.get("Authorization")
            if dashboard.token is not None and given != f"Bearer {dashboard.token}":
                self._send(403 if given else 401, b"no")
            else:
                self._send(200, dashboard.answer(self.path))

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    dashboard.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield dashboard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
