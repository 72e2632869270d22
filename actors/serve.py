"""The composition root of `weaver-rl serve`: from a configuration to a server that answers, and back to nothing left.

It decides nothing about operations: that is the service's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console

from actors.calls import first_error
from actors.cluster import as_joined, cluster_gpus, connected, cpus_per_node
from actors.engine_host import RaySamplers
from actors.learners import RayLearners
from actors.lineup import PreparedModel, prepare_lineup
from actors.ray_metrics import metered
from actors.signals import StopSignals
from weaver_rl.meter import Meter
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.http.app import create_app
from weaver_rl.service.http.auth import ApiKeys
from weaver_rl.service.http.server import HttpServer
from weaver_rl.service.metrics_table import SERVICE_METRICS
from weaver_rl.service.operations import Operations
from weaver_rl.service.service import Service
from weaver_rl.service.service_meter import ServerFigures, follow
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store
from weaver_rl.waits import current_waits


def serve(config: ServeConfig, console: Console) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; everything it started has ended then.

    Raises:
        UserError: something the user can mend.
        KeyboardInterrupt: it was stopped by a signal.
    """
    config = config.model_copy(update={"state_dir": config.state_dir.absolute()})
    keys = ApiKeys.load(config.auth)
    keys.check_host(config.http.host)  # before anything is started
    with (
        StopSignals() as stop,
        StateFiles(config.state_dir) as files,
        connected(config.cluster, files.logs, stop),
        metered(config.cluster, SERVICE_METRICS, {"server": config.name}) as meter,
    ):
        console.print(f"preparing {len(config.models)} model(s)", highlight=False)
        prepared = prepare_lineup(config, config.state_dir)
        try:
            asyncio.run(_serve(config, keys, files, prepared, console, stop, meter))
        except BaseExceptionGroup as errors:  # boundary: the first of several is the reason
            raise first_error(errors) from errors


async def _serve(
    config: ServeConfig,
    keys: ApiKeys,
    files: StateFiles,
    prepared: dict[str, PreparedModel],
    console: Console,
    stop: StopSignals,
    meter: Meter,
) -> None:
    async with stop.running(), contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.opened(config.database or files.database_url))
        operations = Operations(store, config.operations, meter=meter)
        learners, samplers = await stack.enter_async_context(_hosts(config, prepared))
        service = Service(
            config=config,
            store=store,
            operations=operations,
            files=files,
            learners=learners,
            samplers=samplers,
            lineup={name: model.lineup for name, model in prepared.items()},
            meter=meter,
        )
        await stack.enter_async_context(service)
        # They end right after the HTTP server: what runs has its time while all that it needs is still there.
        await stack.enter_async_context(operations)

        def figures() -> ServerFigures:
            return ServerFigures(
                by_kind=operations.by_kind(),
                by_base_model=operations.by_base_model(),
                engines=dict.fromkeys(prepared, 0) | samplers.num_up(),
                learners=dict.fromkeys(prepared, 0) | learners.num_up(),
            )

        following = asyncio.create_task(follow(meter, figures))
        stack.callback(following.cancel)
        server = HttpServer(create_app(service, config, keys, meter=meter), config.http)
        stack.push_async_callback(server.stop)
        url = await server.start()
        console.print(f"weaver-rl serves {', '.join(prepared)} at {url}", highlight=False, soft_wrap=True)
        await _preload(config, learners, samplers, console)
        console.print("ready", highlight=False)
        await server.wait()


@contextlib.asynccontextmanager
async def _hosts(
    config: ServeConfig, prepared: dict[str, PreparedModel]
) -> AsyncIterator[tuple[RayLearners, RaySamplers]]:
    config = config.model_copy(update={"cluster": as_joined(config.cluster)})
    gpus = cluster_gpus()
    learners = RayLearners(config, prepared, cluster_gpus=gpus)
    samplers = RaySamplers(config, prepared, cluster_gpus=gpus, num_threads=cpus_per_node())
    try:
        yield learners, samplers
    finally:
        with current_waits().waiting("server", "learners and engines to end", root=True):
            await asyncio.gather(learners.close_all(), samplers.close_all(), return_exceptions=True)


async def _preload(config: ServeConfig, learners: RayLearners, samplers: RaySamplers, console: Console) -> None:
    """What is to be up before the first client comes. What cannot start now is tried again when it is needed."""
    names = [served.name for served in config.models if served.preload]
    starting = [start(name) for name in names for start in (learners.preload, samplers.preload)]
    results = await asyncio.gather(*starting, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            console.print(f"warning: {error}", markup=False, highlight=False, soft_wrap=True)
