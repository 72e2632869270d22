"""Which job server a command means: its option, else the environment, else the one local cluster. It asks nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from weaver_rl.dashboard_access import is_dashboard
from weaver_rl.errors import ConfigError
from weaver_rl.local_clusters import LocalCluster
from weaver_rl.run_location import ADDRESS_PASSWORD_REFUSED, address_has_password

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")
DASHBOARD_PORT = 8265
NOT_THE_DASHBOARD = {6379: "Ray's own port", 10001: "the port of Ray Client"}


def job_server_address(given: str | None, environment: Mapping[str, str], clusters: Sequence[LocalCluster]) -> str:
    """The URL of a job server.

    Args:
        given: by the user, for this command.
        clusters: those that were started on this machine.

    Raises:
        ConfigError: there is none, or it can be none; says what one looks like.
    """
    if given is not None:
        return _checked(given, "--address")
    for name in VARIABLES:
        if environment.get(name):
            return _checked(environment[name], name)
    ray_address = environment.get("RAY_ADDRESS", "")
    if is_dashboard(ray_address):
        return _checked(ray_address, "RAY_ADDRESS")
    ready = [cluster for cluster in clusters if cluster.ready]
    same = [cluster for cluster in ready if ray_address in ("", cluster.address)]
    if len(same) == 1:
        return same[0].dashboard
    known = "; of this machine's: " + ", ".join(cluster.dashboard for cluster in ready) if ready else ""
    raise ConfigError(
        f"no job server is named: give --address http://HEAD:{DASHBOARD_PORT}, set {VARIABLES[0]}, or start a cluster "
        f"on this machine with `weaver-rl cluster start`{known}"
    )


def _checked(address: str, where: str) -> str:
    if address_has_password(address):
        raise ConfigError(f"{where}: {ADDRESS_PASSWORD_REFUSED}")
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{where} {address}: {error}; write http://HEAD:{DASHBOARD_PORT}") from None
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"{where} {address}: the port is no number; write http://HEAD:{DASHBOARD_PORT}") from None
    if parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"{where} {address}: jobs go to the dashboard by HTTP; write http://{parts.hostname or 'HEAD'}:"
            f"{DASHBOARD_PORT}"
        )
    if not parts.hostname:
        raise ConfigError(f"{where} {address}: no host in it; write http://HEAD:{DASHBOARD_PORT}")
    if "://" not in address and port in NOT_THE_DASHBOARD:
        raise ConfigError(
            f"{where} {address}: {port} is {NOT_THE_DASHBOARD[port]}; jobs go to the dashboard, "
            f"http://{parts.hostname}:{DASHBOARD_PORT} unless it was changed"
        )
    if "://" not in address and port is None:
        url = f"{url}:{DASHBOARD_PORT}"
    return url.rstrip("/")
