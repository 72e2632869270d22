"""Requests/s and latency of `samples` beside the engine asked directly: the same requests and callers, in turns."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from actors.lineup import PreparedModel
from benchmarks.alternation import Effort, alternate, ratio
from benchmarks.child import Child
from benchmarks.plain_vllm import PASSIVE_OPENMP
from benchmarks.results import Row
from benchmarks.scale import Scale
from benchmarks.service_engine import EngineSpec, build_engine_sweep
from benchmarks.service_load import Level, Load, Served, closed_loop
from benchmarks.service_process import Server
from weaver_rl.engines.config import LoraLimits
from weaver_rl.service.config import ServeConfig

OURS = "server"
ALONE = "the engine alone, LoRA off"
WITH_LORA = "the engine alone, LoRA on, no adapter used"
KEEP_ALIVE_S = 60.0
"""Less than the server's own."""
TIMEOUT_S = 120.0


def sample_load(scale: Scale, vocab_size: int) -> Load:
    """What all callers ask for."""
    counts = {1: 6, 16: 32, 128: 128} if scale.quick else {1: 64, 16: 512, 128: 1024}
    levels = tuple(Level(num_callers=callers, num_requests=requests) for callers, requests in counts.items())
    return Load.of(levels, vocab_size=vocab_size, prompt_tokens=32, max_tokens=16)


def engines_alone(scale: Scale, config: ServeConfig, prepared: PreparedModel, load: Load) -> dict[str, Child]:
    """Started, not yet up. Unless quick, also with LoRA on: what that costs is the engine's, not the service's."""
    served = prepared.config
    limits: dict[str, LoraLimits | None] = {ALONE: None}
    if not scale.quick:
        limits[WITH_LORA] = LoraLimits(max_loras=served.max_loras, max_rank=served.max_lora_rank)
    return {
        name: Child(
            build_engine_sweep,
            (
                EngineSpec(
                    model_dir=prepared.model_dir,
                    engine_args={"max_model_len": prepared.max_length} | served.sampler.engine_args,
                    seed=config.seed,
                    stop_token_ids=prepared.stop_tokens,
                    num_threads=served.sampler.num_threads,
                    lora=lora,
                    load=load,
                ),
            ),
            PASSIVE_OPENMP,
        )
        for name, lora in limits.items()
    }


def measure_samples(
    scale: Scale, server: Server, base_model: str, load: Load, engines: Mapping[str, Child]
) -> list[Row]:
    """Rows for each number of callers."""
    effort = Effort(rounds=2 if scale.quick else 7, max_seconds=240)
    sweeps: dict[str, list[list[Served]]] = {}

    def seconds_of(name: str, sweep: Callable[[], list[Served]]) -> Callable[[], float]:
        def measured() -> float:
            levels = sweep()
            sweeps.setdefault(name, []).append(levels)
            return sum(level.seconds for level in levels)

        return measured

    with Callers(server, base_model, load) as callers:
        contenders = {OURS: seconds_of(OURS, callers.sweep)}
        for name, child in engines.items():
            child.wait_started()
            contenders[name] = seconds_of(name, child)
        alternate(contenders, effort)
    rows: list[Row] = []
    for index in range(len(load.levels)):
        rounds = {name: [levels[index] for levels in done[effort.warmups :]] for name, done in sweeps.items()}
        rows += level_rows(rounds.pop(OURS), rounds, load.max_tokens)
    return rows


def level_rows(ours: Sequence[Served], theirs: Mapping[str, Sequence[Served]], max_tokens: int) -> list[Row]:
    """One number of callers: the rounds of the server beside those of each engine."""
    level = ours[0].level
    plural = "" if level.num_callers == 1 else "s"
    case = f"samples, {level.num_callers} caller{plural}: {level.num_requests} requests of {max_tokens} tokens"
    polls = sum(each.num_polls for each in ours) / sum(each.level.num_requests for each in ours)
    parts = ", ".join(
        f"{part} {statistics.median(each.cpu_ms(part) for each in ours):.2f}"
        for part in ("server", "sampler", "callers")
    )

    def row(quantity: str, of: Callable[[Served], float], baseline_name: str, note: str = "") -> Row:
        values = [of(each) for each in ours]
        others = [of(each) for each in theirs[baseline_name]]
        return Row(
            benchmark="service",
            case=case,
            quantity=quantity,
            ours=statistics.median(values),
            baseline=statistics.median(others),
            baseline_name=baseline_name,
            ratio=ratio(values, others),
            note=note,
        )

    same = "the same tokens" if theirs[ALONE][0].digest == ours[0].digest else "other tokens"
    return [
        row("requests/s", lambda each: each.requests_per_s, ALONE, f"{polls:.2f} polls per request; {same}"),
        *(row("requests/s", lambda each: each.requests_per_s, name) for name in theirs if name != ALONE),
        row("p50 latency, ms", lambda each: each.latency_ms(50), ALONE),
        row("p95 latency, ms", lambda each: each.latency_ms(95), ALONE),
        row(
            "CPU ms per request",
            lambda each: each.cpu_ms("server", "sampler", "engine"),
            ALONE,
            f"server process and sampler, without the callers; {parts}",
        ),
    ]


class Callers:
    """Who asks the server, over connections that are kept. A context manager.

    Example:
        with Callers(server, "weaver-rl/tiny", load) as callers:
            levels = callers.sweep()
    """

    def __init__(self, server: Server, base_model: str, load: Load) -> None:
        self._server = server
        self._base_model = base_model
        self._load = load
        self._num_polls = 0
        self._bodies = [
            json.dumps(_body(prompt, number, load.max_tokens)).encode() for number, prompt in enumerate(load.prompts)
        ]

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        self._clients = self._made_clients(max(level.num_callers for level in self._load.levels))
        try:
            self._session = self._runner.run(self._sampling_session())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def sweep(self) -> list[Served]:
        """Every level of the load."""
        return self._runner.run(self._sweep())

    def _made_clients(self, num_clients: int) -> list[httpx.AsyncClient]:
        # Not one for all: what httpx does for a request grows with the connections of its pool, and more than linearly.
        security = httpx.create_ssl_context(trust_env=False)  # slow to make, and not used
        return [
            httpx.AsyncClient(
                base_url=f"{self._server.url}/api/v1",
                verify=security,
                timeout=TIMEOUT_S,
                limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
                headers={"Content-Type": "application/json"},
                trust_env=False,
            )
            for _ in range(num_clients)
        ]

    async def _sweep(self) -> list[Served]:
        return [
            await closed_loop(level, self._ask, self._cpu_s, lambda: self._num_polls) for level in self._load.levels
        ]

    async def _ask(self, caller: int, number: int) -> tuple[int, ...]:
        client = self._clients[caller]
        operation = await _send(client, "POST", f"sampling-sessions/{self._session}/samples", self._bodies[number])
        while operation["status"] in ("pending", "running"):
            self._num_polls += 1
            operation = await _send(client, "GET", f"operations/{operation['id']}")
        if operation["status"] != "done":
            raise RuntimeError(f"request {number} failed: {operation}")
        return tuple(operation["response"]["result"]["sequences"][0]["tokens"])

    async def _sampling_session(self) -> str:
        client = self._clients[0]
        session = await _send(client, "POST", "sessions", b"{}")
        new = {"sampling_session_seq_id": 1, "base_model": self._base_model}
        path = f"sessions/{session['id']}/sampling-sessions"
        created = await _send(client, "POST", path, json.dumps(new).encode())
        return str(created["id"])

    def _cpu_s(self) -> dict[str, float]:
        return self._server.cpu_s() | {"callers": time.process_time()}

    def _close(self) -> None:
        for client in self._clients:
            self._runner.run(client.aclose())
        self._runner.close()


async def _send(client: httpx.AsyncClient, method: str, path: str, body: bytes | None = None) -> Any:
    response = await client.request(method, path, content=body)
    if not response.is_success:
        raise RuntimeError(f"{method} {path} was answered with {response.status_code}: {response.text[:500]}")
    return response.json()


def _body(prompt: Sequence[int], seed: int, max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        "sampling_params": {"temperature": 1.0, "max_tokens": max_tokens, "seed": seed},
    }
