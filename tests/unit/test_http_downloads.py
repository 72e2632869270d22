"""Downloads: signed links, ranges, and links that are not to be trusted."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_client import API, Client, refusal
from http_fakes import FakeService
from http_serving import calling, face

from weaver_rl.errors import ServiceError
from weaver_rl.service.config import HttpConfig
from weaver_rl.service.http.downloads import DownloadLinks, load_secret

pytestmark = pytest.mark.unit

CONTENT = bytes(range(256)) * 1000


def artifact_files(directory: Path) -> Path:
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(CONTENT)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "sub").mkdir()
    (directory / "sub" / "ein name & mehr?.txt").write_text("ü")
    (directory / "empty").touch()
    return directory


async def described(client: Client) -> dict[str, Any]:
    artifact = (await client.post(f"/models/{client.model}/export-hf", {}))["response"]
    answer = await client.get(f"/artifacts/{artifact['id']}/download")
    return {file["name"]: file for file in answer["files"]}


async def _files(tmp_path: Path) -> None:
    service = FakeService(files_dir=artifact_files(tmp_path / "artifact"))
    app = face(service, keys={"alice": "sk-alice"})
    async with calling(app, "sk-alice") as http, calling(app) as nobody:
        client = Client(http, service)
        await client.begin()
        files = await described(client)
        assert sorted(files) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "empty",
            "sub/ein name & mehr?.txt",
        ]
        for name, file in files.items():
            content = (tmp_path / "artifact" / name).read_bytes()
            assert file["url"].startswith(f"http://localhost{API}/downloads/")
            assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            response = await nobody.get(file["url"])
            assert (response.status_code, response.content) == (200, content)
            assert response.headers["Content-Length"] == str(len(content))
            assert "content-encoding" not in response.headers
        await _ranges(nobody, files["adapter_model.safetensors"]["url"])
        await _untrusted(nobody, files["adapter_model.safetensors"]["url"], files["empty"]["url"])
        (tmp_path / "artifact" / "empty").unlink()
        refusal(await nobody.get(files["empty"]["url"]), 404, "not_found")
        service.artifacts_by_id.clear()
        refusal(await nobody.get(files["adapter_config.json"]["url"]), 404, "not_found")


async def _ranges(nobody: httpx.AsyncClient, url: str) -> None:
    size = len(CONTENT)
    for wanted, (start, end) in {
        "bytes=1000-": (1000, size), "bytes=0-99": (0, 100), "bytes=-5": (size - 5, size), f"bytes={size - 1}-": (
            size - 1, size), "bytes=10-999999999": (10, size)
    }.items():  # fmt: skip
        response = await nobody.get(url, headers={"Range": wanted})
        assert (response.status_code, response.content) == (206, CONTENT[start:end]), wanted
        assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        assert response.headers["Content-Length"] == str(end - start)
    several = await nobody.get(url, headers={"Range": "bytes=0-1, 5-6"})
    assert (several.status_code, several.headers["Content-Type"].partition(";")[0]) == (206, "multipart/byteranges")
    for wanted in (f"bytes={size}-", f"bytes={size + 5}-", "bytes=-0", f"bytes=0-1,{size}-"):
        response = await nobody.get(url, headers={"Range": wanted})
        assert refusal(response, 416, "range_not_satisfiable")
        assert response.headers["Content-Range"] == f"bytes */{size}"
    for wanted in ("lines=1-2", "bytes=", "bytes=-", "bytes=2-1", "bytes=a-", "bytes=1-2-3", "bytes=0-1,-"):
        refusal(await nobody.get(url, headers={"Range": wanted}), 400, "invalid_request")


async def _untrusted(nobody: httpx.AsyncClient, url: str, other: str) -> None:
    place, _, query = url.partition("?")
    other_place, _, other_query = other.partition("?")
    expires = query.partition("&")[0].partition("=")[2]
    for forged in (
        f"{place}?{other_query}",
        f"{other_place}?{query}",
        f"{place}?{query[:-1]}{'0' if query[-1] != '0' else '1'}",
        f"{place}?{query.replace(expires, str(int(expires) + 1))}",
        f"{place}?expires={expires}&signature=",
        f"{place}?expires={expires}&signature=é",
        place.replace("adapter_model", "..%2f..%2fetc%2fpasswd%2f") + "?" + query,
        place.rpartition("/")[0] + "/..%2f..%2f..%2fetc%2fpasswd?" + query,
    ):
        refusal(await nobody.get(forged), 403, "invalid_link")
    for malformed in (place, f"{place}?expires=soon&signature=a", f"{place}?expires=-1&signature=a"):
        refusal(await nobody.get(malformed), 400, "invalid_request")


def test_files_ranges_and_forged_links(tmp_path: Path):
    asyncio.run(_files(tmp_path))


def test_a_link_is_for_one_file_and_ends():
    now = [1000.0]
    links = DownloadLinks(b"secret", 60, clock=lambda: now[0])
    link = links.link("a1", "sub/x y.txt")
    assert link.target.startswith("/api/v1/downloads/a1/sub/x%20y.txt?expires=1060&signature=")
    signature = link.target.rpartition("=")[2]
    links.check("a1", "sub/x y.txt", 1060, signature)
    for wrong in (
        ("a2", "sub/x y.txt", 1060, signature),
        ("a1", "other", 1060, signature),
        ("a1", "sub/x y.txt", 1061, signature),
        ("a1", "sub/x y.txt", 1060, signature[:-1]),
    ):
        with pytest.raises(ServiceError, match="no download link of this server"):
            links.check(*wrong)
    with pytest.raises(ServiceError, match="no download link of this server"):
        DownloadLinks(b"another", 60, clock=lambda: now[0]).check("a1", "sub/x y.txt", 1060, signature)
    now[0] = 1060.0
    with pytest.raises(ServiceError) as caught:
        links.check("a1", "sub/x y.txt", 1060, signature)
    assert (caught.value.code, caught.value.status) == ("link_expired", 403)


def test_the_secret_is_made_once_and_for_its_user_alone(tmp_path: Path):
    state_dir = tmp_path / "new" / "state"
    first = load_secret(state_dir)
    assert len(first) == 32
    assert load_secret(state_dir) == first
    (path,) = state_dir.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(tmp_path / "other") != first


async def _public_url(tmp_path: Path) -> None:
    service = FakeService(files_dir=artifact_files(tmp_path / "artifact"))
    app = face(service, http=HttpConfig(port=0, public_url="https://train.example.org/"))
    async with calling(app) as http:
        client = Client(http, service)
        await client.begin()
        for file in (await described(client)).values():
            assert file["url"].startswith("https://train.example.org/api/v1/downloads/")


def test_links_begin_with_the_public_address(tmp_path: Path):
    asyncio.run(_public_url(tmp_path))
