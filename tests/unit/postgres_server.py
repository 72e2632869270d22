"""A PostgreSQL server of our own for the length of a block, if it is installed. It knows no table."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 30.0


class NoPostgresError(Exception):
    """Why there is none."""


def programs() -> tuple[str, str]:
    """initdb and postgres."""
    places = [None, *(str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = [next(filter(None, (shutil.which(name, path=place) for place in places)), None) for name in PROGRAMS]
    if missing := [name for name, path in zip(PROGRAMS, found, strict=True) if path is None]:
        raise NoPostgresError(f"not installed: {', '.join(missing)}")
    return str(found[0]), str(found[1])


PROGRAMS = ("initdb", "postgres")


@contextlib.contextmanager
def postgres_server() -> Iterator[Callable[[], str]]:
    """Yields what makes an empty database and gives its URL. The server listens on a socket in a directory of its own.

    Raises:
        NoPostgresError: it is not installed, or does not start.
    """
    initdb, postgres = programs()
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        home = Path(name)
        # PostgreSQL refuses to run as root.
        account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        as_user: dict[str, Any] = {"cwd": home}
        if account is not None:
            os.chown(home, account.pw_uid, account.pw_gid)
            as_user |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        data = home / "data"
        options = ["-A", "trust", "-U", "weaver", "--no-sync", "-E", "UTF8", "--locale=C"]
        made = subprocess.run([initdb, "-D", str(data), *options], capture_output=True, text=True, **as_user)
        if made.returncode != 0:
            raise NoPostgresError(f"initdb failed: {made.stderr.strip()}")
        # Its processes die with ours only if we are killed politely: the log must not fill a pipe nobody reads.
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(
                [postgres, "-D", str(data), "-k", str(home), "-c", "listen_addresses=", "-c", "fsync=off"],
                stdout=log,
                stderr=log,
                **as_user,
            )
        try:
            yield _maker(home, server)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _maker(home: Path, server: subprocess.Popen[bytes]) -> Callable[[], str]:
    import psycopg

    address = f"host={home} user=weaver"
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(f"{address} dbname=postgres").close()
            break
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise NoPostgresError(f"it does not start: {error}; {(home / 'log').read_text()[-1000:]}") from error
            time.sleep(0.05)
    numbers = itertools.count(1)

    def make() -> str:
        name = f"test_{next(numbers)}"
        with psycopg.connect(f"{address} dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy".encode())
        return f"postgresql+psycopg://weaver@/{name}?host={home}"

    return make
