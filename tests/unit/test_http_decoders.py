"""Large training requests: decoded in other processes to the same, beside a free event loop, by workers that end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from http_client import a_model, refusal
from http_fakes import FakeService
from http_serving import calling, face, served
from pydantic_core import from_json
from test_http_training import MODEL_ID, call_of, datum, for_model, request, tensor

from weaver_rl.errors import ServiceError
from weaver_rl.service.calls import TrainingCall
from weaver_rl.service.http.bodies import INLINE_BYTES
from weaver_rl.service.http.decoders import Decoders
from weaver_rl.service.http.decoding import DecodeJob, Refusal

pytestmark = pytest.mark.unit


PAUSE_S = 0.005


def large_request(num_tokens: int, num_data: int, model_id: str = MODEL_ID) -> bytes:
    """JSON of about 17 bytes a token."""
    numbers = np.random.default_rng(0)
    data = []
    for _ in range(num_data):
        weights = numbers.random(num_tokens).round(6).tolist()
        targets = numbers.integers(0, 1000, num_tokens).tolist()
        data.append(datum(tokens=targets, target_tokens=tensor(targets, "int64"), weights=tensor(weights)))
    return json.dumps(for_model(request(*data), model_id), separators=(",", ":")).encode()


def test_a_large_body_is_decoded_elsewhere_to_the_same():
    raw = large_request(2000, 4)
    assert len(raw) > INLINE_BYTES
    service = FakeService()

    async def send() -> TrainingCall:
        async with calling(face(service)) as client:
            model = await a_model(client)
            body = raw.replace(MODEL_ID.encode(), model.encode())
            response = await client.post(
                f"/api/v1/models/{model}/forward-backward-passes",
                content=body,
                headers={"Content-Type": "application/json"},
            )
            assert response.status_code == 202, response.text
            call = service.calls[0][1]
            assert isinstance(call, TrainingCall)
            assert call.digest == hashlib.sha256(body).hexdigest()
            refused_ = await client.post(
                f"/api/v1/models/{model}/forward-backward-passes",
                content=body.replace(b'"cross_entropy"', b'"nothing"').replace(b'"seq_id":1', b'"seq_id":2'),
                headers={"Content-Type": "application/json"},
            )
            refusal(refused_, 400, "invalid_request")
            assert service.skipped == [(model, 2)]
            return call

    elsewhere = asyncio.run(send())
    here = call_of(raw)
    for one, other in zip(elsewhere.request.data, here.request.data, strict=True):
        np.testing.assert_array_equal(one.token_ids_N, other.token_ids_N)
        assert one.loss_fn_inputs.keys() == other.loss_fn_inputs.keys()
        for name, values in one.loss_fn_inputs.items():
            np.testing.assert_array_equal(values, other.loss_fn_inputs[name])


async def latencies(client: httpx.AsyncClient, sending: asyncio.Task[httpx.Response]) -> list[float]:
    """Seconds that GET /health takes, until a request has its answer."""
    found = []
    while not sending.done():
        # From when it was meant to begin: whoever has the lock may hold it just between two probes.
        before = time.monotonic()
        await asyncio.sleep(PAUSE_S)
        assert (await client.get("/health")).status_code == 200
        found.append(time.monotonic() - before - PAUSE_S)
    assert sending.result().status_code == 202, sending.result().text
    return found


async def slowest_beside(raw: bytes, times: int, url: str) -> list[float]:
    """Of each time that the body is sent, the slowest of the probes beside it."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        model = await a_model(client)
        path, headers = f"/api/v1/models/{model}/forward-backward-passes", {"Content-Type": "application/json"}
        small = json.dumps(for_model(request(datum()), model)).encode() + b" " * INLINE_BYTES
        await client.post(path, content=small, headers=headers)  # the worker is up then
        body = raw.replace(MODEL_ID.encode(), model.encode())
        slowest = []
        for _ in range(times):
            sending = asyncio.create_task(client.post(path, content=body, headers=headers))
            slowest.append(max(await latencies(client, sending)))
        return slowest


def test_the_event_loop_is_free_while_a_large_body_is_decoded():
    """Beside 30 MB of JSON. Parsed by a thread of this process, they would keep the interpreter's lock for as long as
    parsing takes, which is measured first."""
    raw = large_request(12_000, 150)
    assert len(raw) > 30e6
    before = time.monotonic()
    from_json(raw)
    lock_s = time.monotonic() - before
    with served(face(FakeService())) as url:
        slowest = asyncio.run(slowest_beside(raw, 3, url))
    # A thread would show every time; what else this machine does, not every time.
    assert min(slowest) < 0.6 * lock_s


# -- the life of workers ---------------------------------------------------------------------------------------------


def job(body: bytes) -> DecodeJob:
    return DecodeJob(
        body=body,
        content_type="multipart/form-data; boundary=b",
        model_id=MODEL_ID,
        backward=True,
        limit_bytes=1 << 20,
    )


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


async def _replaced() -> None:
    decoders = Decoders(1)
    try:
        assert isinstance(await decoders.decode(job(b"")), Refusal)
        (worker,) = workers_of(psutil.Process())
        os.kill(worker.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(decoders.decode(job(b"")))
        await asyncio.sleep(0.1)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ServiceError) as caught:
            await waiting
        assert (caught.value.code, caught.value.status, caught.value.retryable) == ("decoder_lost", 503, True)
        assert isinstance(await decoders.decode(job(b"")), Refusal)
    finally:
        decoders.close()
    assert workers_of(psutil.Process()) == []


def test_a_worker_that_dies_fails_its_request_and_is_replaced():
    asyncio.run(_replaced())


SERVER = """
import asyncio
from weaver_rl.service.http.decoders import Decoders
from weaver_rl.service.http.decoding import DecodeJob

async def main():
    job = DecodeJob(body=b"", content_type="multipart/form-data", model_id="m", backward=True, limit_bytes=1)
    decoders = Decoders(1)
    await decoders.decode(job)
    print("up", flush=True)
    await asyncio.sleep(60)
    decoders.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_no_worker_outlives_a_killed_server(tmp_path: Path):
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        workers = workers_of(psutil.Process(server.pid))
        assert len(workers) == 1
        server.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
