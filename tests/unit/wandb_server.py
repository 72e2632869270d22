"""A server of Weights & Biases with one run: what wandb's own process asks, as far as a run's history goes."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class WandbServer(http.server.ThreadingHTTPServer):
    """Keeps the lines of the history by their number."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.lines: dict[int, dict[str, Any]] = {}
        self.is_up = True
        self.takes_history = True
        self.has_run = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self) -> dict[str, Any]:
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        tail = [json.dumps(self.lines[max(self.lines)])] if self.lines else []
        run: dict[str, Any] = {"id": "b", "name": "r", "displayName": "a", "tags": [], "project": project}
        run |= {"config": "{}", "summaryMetrics": "{}", "wandbConfig": '{"t": {}}'}
        run |= {"historyLineCount": len(self.lines), "eventsLineCount": 0, "logLineCount": 0}
        return run | {"historyTail": json.dumps(tail), "eventsTail": "[]"}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "RunResumeStatus":
            return {"model": {"entity": {"name": "e"}, "bucket": self.run() if self.has_run else None}}
        if operation == "UpsertBucket":
            self.has_run = True
            return {"upsertBucket": {"bucket": self.run(), "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._body())
        if not self.server.is_up:
            self._answer({}, status=503)
        elif not self.path.endswith("/file_stream"):
            self._answer({"data": self.server.answer(body["operationName"], body["variables"])})
        elif not self.server.takes_history:
            self._answer({}, status=503)
        else:
            history = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for number, line in enumerate(history["content"], start=history["offset"]):
                self.server.lines[number] = json.loads(line)
            self._answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        # A client that is killed leaves its connection: nobody is to read of it.
        server.handle_error = lambda *args: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
