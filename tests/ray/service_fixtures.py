"""One engine with a tokenizer and adapters for all test modules that ask it like clients. A pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from sampler_parts import START_TIMEOUT_S, make_model
from service_parts import MODULES, Reference, make_adapter, make_tokenizer, spec

from actors.sampler import CONCURRENCY_GROUPS, Sampler
from weaver_rl.types import Adapter

pytest_plugins = ("sampler_fixtures",)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with one matrix for embedding and head, and its tokenizer."""
    directory = make_model(tmp_path_factory.mktemp("base"), tied=True)
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Of everything, of the attention, of the head alone; and two more for when there are many."""
    modules = {"all": MODULES, "attention": ("q_proj", "v_proj"), "head": ("lm_head",), "d": MODULES, "e": ("o_proj",)}
    directory = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(directory / name, base_dir, targets, rank=4 + seed, seed=seed)
        for seed, (name, targets) in enumerate(modules.items())
    }


@pytest.fixture(scope="session")
def reference(base_dir: Path) -> Reference:
    return Reference(base_dir)


@pytest.fixture(scope="session")
def service(cluster: None, base_dir: Path) -> Iterator[Any]:
    remote: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Sampler).options(num_cpus=0, max_concurrency=1000)
    actor = remote.remote(1)
    ray.get(actor.start.remote(spec(base_dir)), timeout=START_TIMEOUT_S)
    yield actor
    ray.wait([actor.close.remote()], timeout=30)
