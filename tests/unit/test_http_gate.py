"""What every request passes: keys, rate, and refusals in the one shape that the SDK reads."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from http_client import a_model, refusal
from http_fakes import FakeService
from http_serving import calling, face, serve_config
from test_http_training import datum, for_model, request

from weaver_rl.errors import ConfigError, ServiceError
from weaver_rl.service.config import AuthConfig, HttpConfig, LimitsConfig, is_loopback
from weaver_rl.service.http import auth
from weaver_rl.service.http.app import create_app
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.service.http.limits import RequestRate

pytestmark = pytest.mark.unit

KEYS = {"alice": "sk-alice", "bob": "sk-bob"}


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_come_from_file_and_environment(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# who\nalice: sk-alice\n\nbob : sk:with:colons\n")
    keys = ApiKeys.load(AuthConfig(keys_file=path), {auth.KEYS_VARIABLE: "carol:sk-carol, dave:sk-dave,"})
    owners = [keys.owner_of(key) for key in ("sk-alice", "sk:with:colons", "sk-carol", "sk-dave", "sk-eve", "", None)]
    assert owners == ["alice", "bob", "carol", "dave", None, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice sk-alice", "line 1: must be `name: key`"),
        ("alice: ", "line 1"),
        (": sk-alice", "line 1"),
        ("alice: sk alice", "line 1"),
        ("../alice: sk-alice", "line 1"),
        ("a: k1\n\na: k2", "line 3: a has a key already"),
        ("a: k1\nb: k1", "line 2: b has the same key as another name"),
    ],
)
def test_a_key_file_that_cannot_be_used_names_the_line_and_never_the_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.load(AuthConfig(keys_file=path), {})
    assert "sk-alice" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.load(AuthConfig(keys_file=tmp_path / "absent"), {})


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch):
    keys = ApiKeys.of({f"user{n}": f"sk-{n}" for n in range(5)})
    compared: list[int] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared[-1] += 1
        assert len(a) == len(b) == 32
        return compare(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    for key in ("sk-0", "sk-4", "unknown", "", "ключ"):
        compared.append(0)
        keys.owner_of(key)
    assert compared == [5] * 5


def test_without_keys_only_a_loopback_host_is_allowed():
    for host, fine in (
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.2", False),
    ):
        config = serve_config(HttpConfig(host=host))
        if fine:
            create_app(FakeService(), config, ApiKeys.of({}), download_secret=b"s")
            continue
        with pytest.raises(ConfigError, match="without keys only this machine may call"):
            create_app(FakeService(), config, ApiKeys.of({}), download_secret=b"s")
        create_app(FakeService(), config, ApiKeys.of(KEYS), download_secret=b"s")
    assert is_loopback("127.0.0.2")


async def _with_keys() -> None:
    app = face(FakeService(), keys=KEYS)
    async with calling(app) as client:
        for headers in ({}, {"X-WEAVER-API-KEY": "sk-eve"}, {"Authorization": "Bearer sk-alice"}):
            refusal(await client.post("/api/v1/sessions", json={}, headers=headers), 401, "unauthorized")
            # Also where there is no such route: nobody learns what there is.
            refusal(await client.get("/api/v1/nothing", headers=headers), 401, "unauthorized")
        assert (await client.get("/health")).json()["status"] == "ok"
        alice, bob = ({"X-WEAVER-API-KEY": key} for key in KEYS.values())
        session = (await client.post("/api/v1/sessions", json={}, headers=alice)).json()["id"]
        assert (await client.get(f"/api/v1/sessions/{session}", headers=alice)).status_code == 200
        refusal(await client.get(f"/api/v1/sessions/{session}", headers=bob), 404, "not_found")


def test_a_key_is_needed_and_what_is_anothers_is_not_there():
    asyncio.run(_with_keys())


async def _hosts() -> None:
    open_app = face(FakeService(), http=HttpConfig(port=0, public_url="https://train.example.org/"))
    async with calling(open_app) as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "train.example.org"):
            assert (await client.get("/health", headers={"Host": host})).status_code == 200, host
        for host in ("attacker.example.com", "localhost.attacker.com", "", "[", "10.0.0.1"):
            refusal(await client.get("/health", headers={"Host": host}), 403, "forbidden")
    async with calling(face(FakeService(), keys=KEYS)) as client:
        assert (await client.get("/health", headers={"Host": "anything.example.com"})).status_code == 200


def test_a_server_without_keys_answers_to_no_other_name_than_localhost():
    asyncio.run(_hosts())


# -- rate ------------------------------------------------------------------------------------------------------------


def test_a_bucket_holds_a_burst_and_fills_up():
    now = [0.0]
    rate = RequestRate(LimitsConfig(requests_per_s=10, burst=3), clock=lambda: now[0])

    def granted(owner: str) -> bool:
        try:
            rate.take(owner)
        except ServiceError:
            return False
        return True

    assert [granted("a") for _ in range(5)] == [True, True, True, False, False]
    assert granted("b")
    now[0] = 0.1
    assert [granted("a"), granted("a")] == [True, False]
    now[0] = 100.0
    assert [granted("a") for _ in range(4)] == [True, True, True, False]
    with pytest.raises(ServiceError) as caught:
        rate.take("a")
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("rate_limited", 429, True)
    assert caught.value.details["retry_after"] == pytest.approx(0.1)


async def _rate_limited() -> None:
    app = face(FakeService(), keys=KEYS, limits=LimitsConfig(requests_per_s=0.5, burst=2))
    async with calling(app) as client:
        alice, bob = ({"X-WEAVER-API-KEY": key} for key in KEYS.values())
        answers = [await client.get("/api/v1/models", headers=alice) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        body = refusal(answers[-1], 429, "rate_limited")
        assert body["retryable"] is True
        assert 0 < body["retry_after"] <= 2
        assert answers[-1].headers["Retry-After"] in ("1", "2")
        assert (await client.get("/api/v1/models", headers=bob)).status_code == 200
        assert (await client.get("/health")).status_code == 200


def test_too_many_requests_are_refused_by_key():
    asyncio.run(_rate_limited())


async def _too_many_operations() -> None:
    service = FakeService()
    async with calling(face(service, limits=LimitsConfig(operations_in_flight=4))) as client:
        model = await a_model(client)
        service.in_flight = 4
        response = await client.post(f"/api/v1/models/{model}/optimizer-steps", json={"payload": {"seq_id": 3}})
        assert refusal(response, 429, "rate_limited")["retryable"] is True
        assert service.skipped == [(model, 3)]
        response = await client.post(f"/api/v1/models/{model}/export-sampler", json={"seq_id": 4})
        refusal(response, 429, "rate_limited")
        assert service.skipped == [(model, 3), (model, 4)]
        refusal(await client.post(f"/api/v1/models/{model}/checkpoints", json={"type": "weight"}), 429, "rate_limited")
        passes = f"/api/v1/models/{model}/forward-backward-passes"
        small = for_model(request(datum(), seq_id=6), model)
        assert refusal(await client.post(passes, json=small), 429, "rate_limited")["retryable"] is True
        assert service.skipped == [(model, 3), (model, 4), (model, 6)]

        async def large() -> Any:
            yield b" " * (2 << 20)
            pytest.fail("a large body was read, though its request had no room")

        for length in ({}, {"Content-Length": str(3 << 20)}):
            refusal(await client.post(passes, content=large(), headers=length), 429, "rate_limited")
        assert (len(service.skipped), service.num_receiving) == (3, 0)
        service.in_flight = 3
        assert (await client.post(passes, json=small)).status_code == 202
        response = await client.post(f"/api/v1/models/{model}/optimizer-steps", json={"payload": {"seq_id": 5}})
        assert response.status_code == 202


def test_operations_in_flight_are_bounded_by_key():
    asyncio.run(_too_many_operations())


# -- refusals --------------------------------------------------------------------------------------------------------


async def _shapes() -> None:
    async with calling(face(FakeService())) as client:
        refusal(await client.get("/api/v1/nothing"), 404, "not_found")
        refusal(await client.get("/"), 404, "not_found")
        refusal(await client.get("/api/v1/sessions/"), 404, "not_found")
        response = await client.put("/api/v1/sessions", json={})
        refusal(response, 405, "method_not_allowed")
        assert response.headers["Allow"] == "POST"
        for path in ("/api/v1/sessions/%2e%2e", "/api/v1/models/..%2f..%2fetc", "/api/v1/operations/a%00b"):
            refusal(await client.get(path), 404, "not_found")
        refusal(await client.get("/api/v1/models?limit=0"), 400, "invalid_request")
        response = await client.get("/api/v1/models?offset=x")
        assert "offset" in refusal(response, 400, "invalid_request")["message"]


def test_unknown_routes_methods_ids_and_queries():
    asyncio.run(_shapes())


@pytest.mark.parametrize(
    ("content", "content_type", "status", "message"),
    [
        (b"{", "application/json", 400, "is no JSON"),
        (b'{"name": NaN}', "application/json", 400, "is no JSON"),
        (b'{"name": "\\ud800"}', "application/json", 400, "is no JSON"),
        (b"[" * 5000, "application/json", 400, "is no JSON"),
        (b"\xff\xfe", "application/json", 400, "is no JSON"),
        (b"[]", "application/json", 400, "body: "),
        (b'"text"', "application/json", 400, "body: "),
        (b"", "application/json", 400, "body: is missing"),
        (b"{}", "text/plain", 415, "allowed: application/json"),
        (b"{}", "", 415, "allowed: application/json"),
        (b'{"name": 5}', "application/json", 400, "name: "),
        (b'{"name": "a\\u0000b"}', "application/json", 400, "name: has the character U\\+0000"),
        (b'{"user_metadata": {"a": ["\\u0000"]}}', "application/json", 400, "user_metadata: has the character U"),
        (b'{"user_metadata": {"a": 1e999}}', "application/json", 400, "float64"),
        (b'{"user_metadata": {"a": 1' + b"0" * 400 + b"}}", "application/json", 400, "float64"),
        (b'{"tags": "one"}', "application/json", 400, "tags: "),
        (b'{"tags": [1]}', "application/json", 400, r"tags\[0\]: "),
    ],
)
def test_a_body_that_cannot_be_taken_is_named(content: bytes, content_type: str, status: int, message: str):
    async def send() -> None:
        async with calling(face(FakeService())) as client:
            headers = {"Content-Type": content_type} if content_type else {}
            response = await client.post("/api/v1/sessions", content=content, headers=headers)
            code = "unsupported_media_type" if status == 415 else "invalid_request"
            text = refusal(response, status, code)["message"]
            assert re.search(message, text), text
            assert len(text) < 1000

    asyncio.run(send())


class BrokenService(FakeService):
    """A defect of ours."""

    async def heartbeat(self, owner: str, session_id: str) -> None:
        raise ZeroDivisionError("secret detail")


async def _broken(caplog: pytest.LogCaptureFixture) -> None:
    async with calling(face(BrokenService())) as client:
        body = refusal(await client.post("/api/v1/sessions/a/heartbeat"), 500, "internal_error")
    assert "secret detail" not in body["message"]
    assert body["request_id"] in caplog.text
    assert "secret detail" in caplog.text


def test_what_nobody_foresaw_is_logged_under_the_id_that_the_client_has(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        asyncio.run(_broken(caplog))


async def _details() -> None:
    class Refusing(FakeService):
        async def heartbeat(self, owner: str, session_id: str) -> None:
            details: dict[str, object] = {"required_usd": "2", "retry_after": 7}
            raise ServiceError("quota_exceeded", "no", status=402, retryable=True, details=details)

    async with calling(face(Refusing())) as client:
        response = await client.post("/api/v1/sessions/a/heartbeat")
        body = refusal(response, 402, "quota_exceeded")
        assert body["details"]["required_usd"] == "2"
        assert (body["retry_after"], response.headers["Retry-After"]) == (7, "7")
        assert body["retryable"] is True


def test_the_services_own_words_reach_the_client():
    asyncio.run(_details())
