"""The configuration of a server: what ships loads, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from weaver_rl.config_file import load_file
from weaver_rl.errors import ConfigError
from weaver_rl.service.config import ServeConfig, is_loopback

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("serve_*.yaml")), ids=lambda path: path.name)
def test_every_server_config_loads_and_round_trips_to_an_equal_object(path: Path):
    config = load_file(ServeConfig, path)
    assert ServeConfig.model_validate_json(config.model_dump_json()) == config


def refusal(tmp_path: Path, *overrides: str, **changes: Any) -> str:
    model = {"name": "a", "model": {"name": "some/directory"}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"models": [model]} | changes))
    with pytest.raises(ConfigError) as refused:
        load_file(ServeConfig, path, overrides)
    return str(refused.value)


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path):
    assert "http.prot: unknown key; did you mean 'port'?" in refusal(tmp_path, "http.prot=80")
    assert "did you mean 'training_modes'?" in refusal(tmp_path, "models.0.training_mode=lora")


def test_two_models_of_one_name_are_refused(tmp_path: Path):
    model = {"name": "a", "model": {"name": "some/directory"}}
    assert "a given twice" in refusal(tmp_path, models=[model, model])


def test_a_scratch_model_needs_a_task(tmp_path: Path):
    assert "task whose texts" in refusal(tmp_path, models=[{"name": "a", "model": {"name": "scratch"}}])


def test_one_engine_for_each_base_model(tmp_path: Path):
    assert "one engine" in refusal(tmp_path, "models.0.sampler.num_replicas=2")


def test_a_server_needs_a_model(tmp_path: Path):
    assert "list of at least 1" in refusal(tmp_path, models=[])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False), ("a.b", False)],
)
def test_loopback(host: str, loopback: bool):
    assert is_loopback(host) is loopback
