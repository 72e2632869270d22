"""A cluster of somebody else's for tests of commands that join one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_nodes import ray_head


@pytest.fixture
def head() -> Iterator[str]:
    """Address of a Ray head of our own."""
    with ray_head() as address:
        yield address
