"""Checks of a server: our own configuration passes, and each thing that would keep it from starting is named."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from check_parts import GIB, ROOT, cluster, lines, node
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from weaver_rl.check.checklist import run_check
from weaver_rl.check.finding import RoleMemory
from weaver_rl.check.memory import adapter_parameters
from weaver_rl.check.policy_shape import shape_of
from weaver_rl.check.resources import ClusterFacts
from weaver_rl.check.serve_checklist import ServerUnderCheck, serve_checklist
from weaver_rl.config_file import load_file
from weaver_rl.service.config import ServeConfig

pytestmark = pytest.mark.unit

QUICKSTART = ROOT / "configs" / "serve_quickstart.yaml"


def found(*overrides: str, facts: ClusterFacts | None = None, gpu_memory_gb: float | None = None):
    config = load_file(ServeConfig, QUICKSTART, ["http.port=0", *overrides])
    server = ServerUnderCheck.of(config, cluster=lambda: facts or cluster(), gpu_memory_gb=gpu_memory_gb)
    entries = {check.title: run_check(check) for check in serve_checklist(server, QUICKSTART)}
    return entries | {"all": lines(entry for group in entries.values() for entry in group)}


def test_our_own_server_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WEAVER_RL_API_KEYS", raising=False)
    seen = found(f"state_dir={tmp_path / 'state'}")
    assert {line.level for line in seen["all"].values()} <= {"pass", "warn"}, seen["all"]
    assert "sequences of 256 tokens; ends with '<eos>'" in lines(seen["models"])["weaver-rl/tiny"].seen
    assert lines(seen["cluster"])["placement"].seen == "learner and engine of 1 model(s) ask for 0.5 CPUs"
    assert [entry.role for entry in seen["memory"] if isinstance(entry, RoleMemory)] == ["learner rank", "sampler"]
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_and_a_host_for_all_without_keys_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WEAVER_RL_API_KEYS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        seen = found(f"http.port={port}")["all"]
    assert seen["http.port"].level == "fail"
    assert f"127.0.0.1:{port}: Address already in use" in seen["http.port"].seen
    assert "no API key is configured" in found("http.host=0.0.0.0")["all"]["API keys"].seen
    monkeypatch.setenv("WEAVER_RL_API_KEYS", "me:secret")
    keys = found("http.host=0.0.0.0")["all"]["API keys"]
    assert (keys.level, keys.seen) == ("pass", "1 key(s); http.host is 0.0.0.0")


def test_models_and_room_that_are_not_there_fail(tmp_path: Path):
    seen = lines(found("models.0.max_length=100000")["models"])["weaver-rl/tiny"]
    assert "max_length is 100000, the model was made for 1024 tokens" in seen.seen
    (tmp_path / "file").touch()
    assert found(f"state_dir={tmp_path / 'file'}")["all"]["state_dir"].level == "fail"
    assert found(facts=cluster(node(cpus=0.25)))["all"]["placement"].level == "fail"
    assert lines(found("models.0.model={name: ./nowhere}")["models"])["weaver-rl/tiny"].level == "fail"


def test_a_gpu_shared_by_learner_and_engine_holds_both():
    halves = ("models.0.learner.num_gpus=0.5", "models.0.sampler.num_gpus=0.5")
    facts = cluster(node(gpus=1, gpu_memory_bytes=80 * GIB))
    assert (
        found(*halves, "models.0.sampler.engine_args.gpu_memory_utilization=0.5", facts=facts)["all"][
            "GPU of weaver-rl/tiny"
        ].level
        == "pass"
    )
    assert (
        found(*halves, "models.0.sampler.engine_args.gpu_memory_utilization=0.99", facts=facts)["all"][
            "GPU of weaver-rl/tiny"
        ].level
        == "fail"
    )


def test_an_adapters_parameters_are_those_that_peft_makes():
    llama = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=300,
    )
    model = get_peft_model(LlamaForCausalLM(llama), LoraConfig(r=8, target_modules="all-linear"))
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(shape_of(llama), 8) == made
