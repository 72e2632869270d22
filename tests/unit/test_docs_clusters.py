"""docs/clusters.md and deploy/README.md: the commands, options, keys and files that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from deploy_manifests import KUBERAY, documents
from docs_links import broken_links, commands_and_options, unknown_commands, unknown_keys

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "docs" / "clusters.md", ROOT / "deploy" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path):
    text = document.read_text()
    assert not broken_links(document)
    assert not unknown_keys(text)
    assert not unknown_commands(text)


def test_wrong_ones_are_found(tmp_path: Path):
    text = "`weaver-rl submitt CONFIG` and `weaver-rl submit CONFIG --adress X`, `learner.rate`"
    text += ", [x](gone.md), `deploy/gone.md`"
    (tmp_path / "a.md").write_text(text)
    assert unknown_commands(text) == ["submitt CONFIG", "submit CONFIG --adress X: --adress"]
    assert unknown_keys(text) == ["learner.rate"]
    assert broken_links(tmp_path / "a.md") == ["gone.md", "deploy/gone.md"]


def test_every_way_that_the_issue_asks_for_has_its_section():
    headings = re.findall(r"^## (.*)$", DOCUMENTS[0].read_text(), flags=re.MULTILINE)
    assert {"A laptop", "Bare hosts", "KubeRay", "Slurm", "Submit, follow, stop"} <= set(headings)
    headings = re.findall(r"^## (.*)$", DOCUMENTS[1].read_text(), flags=re.MULTILINE)
    assert {"Docker", "KubeRay", "Ray cluster launcher", "Slurm", "Prometheus", "Grafana"} <= set(headings)
    assert len(commands_and_options(DOCUMENTS[0].read_text())) > 15


def test_every_file_for_deploying_is_named():
    text = "".join(document.read_text() for document in DOCUMENTS)
    for file in [*KUBERAY.glob("*.yaml"), *(ROOT / "deploy" / "ray").iterdir(), *(ROOT / "deploy" / "slurm").iterdir()]:
        assert file.name in text, file.name


def test_objects_that_the_documents_name_are_those_of_the_manifests():
    text = DOCUMENTS[0].read_text()
    names = {item["metadata"]["name"] for item in documents() if "metadata" in item}
    for name in re.findall(r"(?:get rayjob|delete rayjob|logs -f job/|get secret|deployment/)\s*([\w-]+)", text):
        assert name in names
    for name in re.findall(r"svc/([\w-]+)", text):
        assert name.removesuffix("-head-svc") in names
    assert "job/gsm8k" in text
    assert "weaver-rl-api-keys" in text


def test_the_claims_about_what_was_tested_name_tests_that_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)`", DOCUMENTS[1].read_text())
    assert len(named) >= 6
    assert all((ROOT / name).is_file() for name in named)
