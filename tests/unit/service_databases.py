"""The databases that tests of the store run on, as fixtures: a fresh SQLite file or PostgreSQL database each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from postgres_server import NoPostgresError, postgres_server


@pytest.fixture(scope="module")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes an empty database and gives its URL."""
    with ExitStack() as stack:
        try:
            make = stack.enter_context(postgres_server())
        except NoPostgresError as reason:
            pytest.skip(f"no PostgreSQL: {reason}")
        yield make


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'weaver.sqlite'}"
    make: Callable[[], str] = request.getfixturevalue("postgres")
    return make()
