"""Ray's job server as this program talks to it: every call is bounded in time, every failure one clear sentence.

It knows no configuration and no package's content.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.modules.job.sdk import JobSubmissionClient
from ray.exceptions import AuthenticationError

from weaver_rl.dashboard_access import asks_for_token, given_headers
from weaver_rl.errors import ConfigError, JobServerLostError, UnknownJobError, UserError

JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
ENDED: tuple[JobState, ...] = ("STOPPED", "SUCCEEDED", "FAILED")

CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 60.0
UPLOAD_STALLED_S = 120.0
"""So long an upload may make no progress; all of it takes what it takes."""
API_SERVER = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLook:
    """How a job stands.

    Example:
        JobLook(job_id="quickstart-1a2b3c4d", state="RUNNING", message="", exit_code=None, started_at=1767225600.0,
                ended_at=None, entrypoint="weaver-rl train quickstart.yaml")
    """

    job_id: str
    state: JobState
    message: str
    exit_code: int | None
    """Of the entrypoint; None while it runs, and when it never ran."""
    started_at: float | None
    """Seconds since the epoch."""
    ended_at: float | None
    entrypoint: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


for _name in (JobSubmissionClient.__module__, SubmissionClient.__module__):
    # They set their own level; each package and each end of a connection would be a line between those of the run.
    logging.getLogger(_name).setLevel(logging.WARNING)


class _BoundedClient(JobSubmissionClient):
    """Ray's own waits for an answer as long as it takes."""

    def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **kwargs: Any) -> requests.Response:
        if data is not None:
            return self._upload(method, endpoint, data, **kwargs)
        kwargs.setdefault("timeout", (CONNECT_WITHIN_S, ANSWER_WITHIN_S))
        response: requests.Response = super()._do_request(method, endpoint, **kwargs)
        return response

    def _upload(self, method: str, endpoint: str, data: bytes, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", (UPLOAD_STALLED_S, UPLOAD_STALLED_S))
        try:
            # The first timeout bounds each block of a file; of bytes it bounds the whole.
            blocks: Any = io.BytesIO(data)
            response: requests.Response = super()._do_request(method, endpoint, data=blocks, **kwargs)
        except requests.RequestException as error:
            raise JobServerLostError(
                f"upload of {len(data) / 2**20:.1f} MB to {self._address} did not finish ({_last_line(error)}). It may "
                f"take long, but not {UPLOAD_STALLED_S:g} s without progress: submit again, or send less with "
                "--exclude or a smaller --working-dir"
            ) from None
        return response


class JobServer:
    """The job server at an address.

    Raises, everywhere:
        JobServerLostError: no answer, or none that makes sense.
        ConfigError: an answer that trying again does not change: a wrong token, an unknown job, a refused request.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        headers = given_headers()
        with _decided(address), _explained(address):
            self._client = _BoundedClient(address, headers=headers, verify=_certificates())

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        return self._client._server_ray_version or "unknown"

    def submit(self, *, entrypoint: str, job_id: str, package: Path, env_vars: Mapping[str, str]) -> None:
        """Sends the package, if the cluster does not have it yet, and starts the job."""
        runtime_env = {"working_dir": str(package), "env_vars": dict(env_vars)}
        try:
            with _explained(self.address):
                self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env)
        except JobServerLostError:
            # The answer may have been lost and not the request: the job has a name of ours.
            try:
                self.look(job_id)
            except (JobServerLostError, UnknownJobError):
                pass
            else:
                return
            raise

    def look(self, job_id: str) -> JobLook:
        with _explained(self.address, job_id):
            return _look(self._client.get_job_info(job_id))

    def jobs(self) -> list[JobLook]:
        """Those that were submitted, the oldest first."""
        with _explained(self.address):
            looks = [_look(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(looks, key=lambda look: look.started_at or 0.0)

    def log(self, job_id: str) -> str:
        """All of it."""
        with _explained(self.address, job_id):
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Asks the job to end; returns whether it was running."""
        with _explained(self.address, job_id):
            return self._client.stop_job(job_id)

    async def tail(self, job_id: str) -> AsyncGenerator[str, None]:
        """The log from its beginning and as it grows; ends when the job has ended, or the server lost sight of it."""
        with _explained(self.address, job_id):
            async for text in self._client.tail_job_logs(job_id):
                yield text


@contextlib.contextmanager
def _decided(address: str) -> Iterator[None]:
    """Ray lets the environment override the address that it is given; ours was chosen with it in mind."""
    before = os.environ.get(API_SERVER)
    os.environ[API_SERVER] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[API_SERVER]
        else:
            os.environ[API_SERVER] = before


def _certificates() -> bool | str:
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True


def _look(details: Any) -> JobLook:
    return JobLook(
        job_id=details.submission_id or details.job_id,
        state=str(getattr(details.status, "value", details.status)),  # type: ignore[arg-type]
        message=details.message or "",
        exit_code=getattr(details, "driver_exit_code", None),
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        entrypoint=details.entrypoint or "",
    )


class _explained:  # noqa: N801  reads as a statement
    """Turns what Ray's client raises into our errors."""

    def __init__(self, address: str, job_id: str = "") -> None:
        self._address = address
        self._job_id = job_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        if isinstance(error, AuthenticationError) or _http_status(error) in (401, 403):
            raise ConfigError(asks_for_token(self._address, _first_line(error))) from None
        status = _http_status(error)
        if status == 404:
            if self._job_id:
                raise UnknownJobError(
                    f"{self._address} knows no job {self._job_id!r}; `weaver-rl jobs --address {self._address}` lists "
                    "those that it knows"
                ) from None
            raise ConfigError(f"{self._address} has no job server (status 404). {_which_address()}") from None
        if status is not None and 400 <= status < 500:
            raise ConfigError(f"{self._address} refused the request (status {status}): {_last_line(error)}") from None
        if isinstance(error, (requests.RequestException, aiohttp.ClientError, OSError, TimeoutError, RuntimeError)):
            raise JobServerLostError(
                f"no job server answers at {self._address} ({_last_line(error)}). {_which_address()}"
            ) from None
        if isinstance(error, (ValueError, KeyError)):
            raise JobServerLostError(
                f"what answers at {self._address} is no job server ({_last_line(error)}). {_which_address()}"
            ) from None


def _which_address() -> str:
    return "`--address` is that of the dashboard, http://HEAD:8265 unless it was changed; not Ray's own (HEAD:6379)"


def _http_status(error: BaseException) -> int | None:
    """Of the answer that Ray's client made an error of: in words only where it is a RuntimeError of its own."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code
    words = str(error).partition("status code ")[2][:3]
    if isinstance(error, RuntimeError) and words.isdigit():
        return int(words)
    if isinstance(error, RuntimeError) and "returned 404" in str(error):
        return 404
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    """A server's traceback says at its end what was wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
