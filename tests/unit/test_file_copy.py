"""Directories described, compared, and written from pieces."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from weaver_rl import file_copy
from weaver_rl.errors import FilesError
from weaver_rl.file_copy import NUM_SAMPLES, SAMPLE_BYTES, describe, has_files, pieces, read_chunk, write_files

pytestmark = pytest.mark.unit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "inner").mkdir(parents=True)
    (directory / "empty").touch()
    (directory / "inner" / "config.json").write_text("{}")
    rng = np.random.default_rng(0)
    (directory / "weights").write_bytes(rng.bytes(NUM_SAMPLES * SAMPLE_BYTES + 12345))
    (directory / "link").symlink_to(directory / "weights")
    return directory


def copied(source: Path, target: Path) -> None:
    facts = describe(source)
    target.mkdir()
    write_files(target, facts, (read_chunk(source, name, offset) for name, offset in pieces(facts)))


def test_a_copy_has_the_same_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_copy, "CHUNK_BYTES", 100_000)
    copied(source, tmp_path / "target")
    names = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(names) == 4
    assert all((tmp_path / "target" / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert describe(tmp_path / "target").fingerprint == describe(source).fingerprint


@pytest.mark.parametrize("offset", [0, NUM_SAMPLES * SAMPLE_BYTES // 2 - 1, NUM_SAMPLES * SAMPLE_BYTES - 1, -1])
def test_files_of_the_same_size_with_other_content_are_not_the_same(source: Path, tmp_path: Path, offset: int):
    facts = describe(source)
    shutil.copytree(source, tmp_path / "other")
    assert has_files(tmp_path / "other", facts)
    content = bytearray((tmp_path / "other" / "weights").read_bytes())
    content[offset] ^= 1
    (tmp_path / "other" / "weights").write_bytes(content)
    assert not has_files(tmp_path / "other", facts)


def test_a_layer_of_a_large_model_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_copy, "SAMPLE_EVERY_BYTES", 2 * SAMPLE_BYTES)
    content = bytearray(300 * SAMPLE_BYTES)
    (tmp_path / "weights").write_bytes(content)
    facts = describe(tmp_path)
    for layer in range(0, 300, 23):
        changed = bytearray(content)
        changed[layer * SAMPLE_BYTES : (layer + 2) * SAMPLE_BYTES] = b"1" * 2 * SAMPLE_BYTES
        (tmp_path / "weights").write_bytes(changed[: len(content)])
        assert not has_files(tmp_path, facts)


def test_a_missing_file_is_noticed_and_another_one_does_not_matter(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other" / "more").touch()
    assert has_files(tmp_path / "other", describe(source))
    (tmp_path / "other" / "empty").unlink()
    assert not has_files(tmp_path / "other", describe(source))


def test_only_wanted_files_are_described(source: Path):
    assert [file.name for file in describe(source, lambda name: name.endswith(".json")).files] == ["inner/config.json"]


def test_damage_on_the_way_is_found(source: Path, tmp_path: Path):
    facts = describe(source)
    (tmp_path / "target").mkdir()
    chunks = [read_chunk(source, name, offset) for name, offset in pieces(facts)]
    chunks[-1] = dataclasses.replace(chunks[-1], content=chunks[-1].content ^ 1)
    with pytest.raises(FilesError, match="weights was damaged on its way"):
        write_files(tmp_path / "target", facts, chunks)


def test_files_that_change_meanwhile_are_refused(source: Path, tmp_path: Path):
    facts = describe(source)
    (source / "inner" / "config.json").write_text("[]")
    (tmp_path / "target").mkdir()
    with pytest.raises(FilesError, match="changed while"):
        write_files(tmp_path / "target", facts, (read_chunk(source, *piece) for piece in pieces(facts)))


def test_too_little_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(FilesError, match=r"has 0 MB free .* XDG_CACHE_HOME"):
        copied(source, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FilesError, match="nowhere is not there"):
        describe(tmp_path / "nowhere")
    with pytest.raises(FilesError, match="file cannot be read"):
        read_chunk(tmp_path, "file", 0)
