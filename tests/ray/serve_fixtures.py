"""One real server for the tests that only talk to it. A pytest plugin; tests import nothing from here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serve_parts import RunningServer
from weaver import ServiceClient


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the shared server come after those that look for processes which were left behind."""
    items.sort(key=lambda item: "server" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(
        tmp_path_factory.mktemp("server") / "state", "retention.sweep_every_s=0.5", "http.submit_grace_s=0.02"
    )
    yield running
    assert running.stop() == 130, running.output
    assert "Traceback" not in running.output


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[ServiceClient]:
    """One for all: the SDK takes five seconds to close."""
    with server.client() as service:
        yield service
