"""A model's files on a node: found where they are, fetched once where they are not."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from actors import model_files
from actors.file_transfer import NodeDirectory
from actors.model_files import ModelFiles, model_here
from weaver_rl.errors import FilesError
from weaver_rl.file_copy import DirectoryFacts, describe, pieces, read_chunk, write_files

pytestmark = pytest.mark.unit


class Driver:
    """The driver's node: what it has is in a directory that the other node asks for by another path."""

    def __init__(self, directory: Path, path: Path) -> None:
        self.directory = directory
        self.path = path
        self.num_fetched = 0

    @property
    def files(self) -> ModelFiles:
        return ModelFiles(place=NodeDirectory(node_id="driver's", path=self.path), num_bytes=1)

    def describe_there(self, place: NodeDirectory, wanted: object) -> DirectoryFacts:
        assert place.path == self.path
        return describe(self.directory, wanted)  # type: ignore[arg-type]

    def fetch(self, place: NodeDirectory, facts: DirectoryFacts, target: Path) -> None:
        self.num_fetched += 1
        time.sleep(0.05)  # others come meanwhile
        write_files(target, facts, (read_chunk(self.directory, *piece) for piece in pieces(facts)))


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    directory = tmp_path / "driver" / "model"
    (directory / ".cache").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", ".cache/x", "weaver_rl_source.json"):
        (directory / name).write_text(name)
    driver = Driver(directory, tmp_path / "here" / "model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "this_node", lambda: "another")
    monkeypatch.setattr(model_files, "describe_there", driver.describe_there)
    monkeypatch.setattr(model_files, "fetch", driver.fetch)
    return driver


def test_on_the_drivers_node_nothing_is_copied(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_files, "this_node", lambda: "driver's")
    assert model_here(driver.files) == driver.path
    assert driver.num_fetched == 0


def test_what_is_missing_is_fetched_once_and_found_again(driver: Driver, tmp_path: Path):
    first = model_here(driver.files)
    assert first.is_relative_to(tmp_path / "cache" / "weaver-rl" / "models")
    assert (first / "model.safetensors").read_text() == "model.safetensors"
    assert not (first / "pytorch_model.bin").exists()
    assert not (first / ".cache").exists()
    assert model_here(driver.files) == first
    assert driver.num_fetched == 1


def test_several_at_once_fetch_once(driver: Driver):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(model_here(driver.files))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert driver.num_fetched == 1


def test_the_same_files_at_the_same_path_are_used(driver: Driver):
    shutil.copytree(driver.directory, driver.path)
    assert model_here(driver.files) == driver.path
    assert driver.num_fetched == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model-2.safetensors"])
def test_other_files_at_the_same_path_are_not(driver: Driver, name: str):
    shutil.copytree(driver.directory, driver.path)
    (driver.path / name).write_text("MODEL.safetensors")
    assert model_here(driver.files) != driver.path


def test_a_hub_model_in_the_nodes_own_cache_is_used(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    driver.path = Path("/home/driver/.cache/huggingface/hub/models--org--name/snapshots/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(driver.directory, tmp_path / "hub" / "models--org--name" / "snapshots" / "abc")
    assert model_here(driver.files) == tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    assert driver.num_fetched == 0


def test_a_copy_that_was_changed_is_made_again(driver: Driver):
    copy = model_here(driver.files)
    (copy / "model.safetensors").write_text("MODEL.safetensors")
    assert model_here(driver.files) == copy
    assert (copy / "model.safetensors").read_text() == "model.safetensors"
    assert driver.num_fetched == 2


def test_what_a_killed_fetch_and_old_runs_left_goes_with_the_next(driver: Driver):
    copy = model_here(driver.files)
    half = copy.with_name(f".{copy.name}-abc")
    half.mkdir()
    long_ago = time.time() - 40 * 86400
    os.utime(copy, (long_ago, long_ago))
    (driver.directory / "model.safetensors").write_text("new")
    other = model_here(driver.files)
    assert other != copy
    assert not copy.exists()
    half = other.with_name(f".{other.name}-abc")
    half.mkdir()
    shutil.rmtree(other)
    assert model_here(driver.files) == other
    assert not half.exists()


def test_a_fetch_that_fails_leaves_nothing(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise FilesError("no room")

    monkeypatch.setattr(model_files, "fetch", fail)
    with pytest.raises(FilesError, match="no room"):
        model_here(driver.files)
    assert [p.name for p in (tmp_path / "cache" / "weaver-rl" / "models").iterdir() if p.is_dir()] == []
