"""Jobs against a fake job server with a real port: lost connections, wrong servers, what is asked of it and said."""

from __future__ import annotations

import io
import json
import random
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_job_server import JOB, FakeJob, serving
from rich.console import Console
from urllib3.connection import HTTPConnection

from actors import job_client, jobs
from actors.job_client import JobServer
from actors.jobs import JobRequest, exit_status, follow, submit
from weaver_rl import cli
from weaver_rl.commands import jobs as jobs_command
from weaver_rl.config import load_config
from weaver_rl.errors import ConfigError, JobServerLostError, UnknownJobError
from weaver_rl.exit_status import INTERRUPTED

pytestmark = pytest.mark.unit

TINY = Path(__file__).parents[1] / "ray" / "tiny.yaml"
LINES = [f"step {number} of the run" for number in range(40)]
LOG = "\n".join(LINES) + "\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SILENCE_S", "LOOK_EVERY_S", "RETRY_FIRST_S"):
        monkeypatch.setattr(jobs, name, 0.05)
    monkeypatch.setattr(jobs, "STALE_S", 0.15)
    monkeypatch.setattr(jobs, "RETRY_AT_MOST_S", 0.1)
    monkeypatch.setattr(jobs, "LOG_OF_ENDED_S", 0.3)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def read(server: JobServer, **options: object) -> tuple[list[str], list[str], jobs.JobLook]:
    """Lines of the job, our remarks, and how it ended."""
    output = io.StringIO()
    look = follow(server, JOB, Console(file=output, width=30), **{"reconnect_s": 5.0, **options})  # type: ignore[arg-type]
    lines = output.getvalue().splitlines()
    notes = [line for line in lines if line.startswith("-- ")]
    return [line for line in lines if line not in notes], notes, look


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weaver-rl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# -- following ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [100], [23, 25], [0, 0, 1, 22, 23, 24, 500, 500, 700]])
def test_every_line_once_though_the_connection_breaks_in_the_middle_of_lines(cuts: list[int]):
    job = FakeJob(log=LOG, cuts=list(cuts))
    with serving(job) as server:
        lines, notes, look = read(JobServer(server.address))
    assert lines == LINES
    assert look.state == "SUCCEEDED"
    assert job.num_connections == len(cuts) + 1
    assert sum("connection lost" in note for note in notes) == sum("connected again" in note for note in notes)
    assert bool(notes) == bool(cuts)


def test_errors_of_the_server_are_waited_out():
    job = FakeJob(log=LOG)
    with serving(job) as server:
        answered = JobServer(server.address)
        job.errors = [500, 503, 500]
        lines, notes, look = read(answered)
    assert (lines, look.state) == (LINES, "SUCCEEDED")
    assert len(notes) == 2


def test_a_server_that_is_away_for_a_while_is_found_again():
    job = FakeJob(log=LOG, cuts=[300])
    with serving(job) as server:
        answered = JobServer(server.address)

        def away() -> None:
            while not job.num_connections:
                time.sleep(0.005)
            server.close()
            time.sleep(0.3)
            server.open()

        thread = threading.Thread(target=away)
        thread.start()
        lines, notes, look = read(answered)
        thread.join()
    assert (lines, look.state) == (LINES, "SUCCEEDED")
    assert "connection lost" in notes[0]
    assert "connected again" in notes[-1]


def test_a_server_that_is_gone_for_good_is_given_up_with_what_to_do():
    job = FakeJob(log=LOG, cuts=[300])
    with serving(job) as server:
        answered = JobServer(server.address)
        server.close()
        began = time.monotonic()
        with pytest.raises(JobServerLostError, match=rf"Gave up after \d+ s; the job goes on: `weaver-rl logs {JOB}"):
            read(answered, reconnect_s=0.5)
    assert time.monotonic() - began < 3


def test_a_connection_that_is_dead_and_looks_silent_is_noticed():
    job = FakeJob(log=LOG, silent=True)
    with serving(job) as server:
        lines, notes, look = read(JobServer(server.address))
    assert (lines, notes, look.state) == (LINES, [], "SUCCEEDED")


def test_a_connection_that_was_slow_to_tell_the_log_again_tells_no_line_twice():
    job = FakeJob(log=LOG, pauses_at=100)
    with serving(job) as server:
        lines, notes, look = read(JobServer(server.address), tail=2)
    assert (lines, notes, look.state) == (LINES[-2:], [], "SUCCEEDED")
    assert job.num_connections == 1


def test_the_last_line_needs_no_newline_and_tail_leaves_out_the_first():
    job = FakeJob(log=LOG + "half a line", cuts=[50])
    with serving(job) as server:
        assert read(JobServer(server.address))[0] == [*LINES, "half a line"]
        job.state = "RUNNING"
        assert read(JobServer(server.address), tail=2)[0] == [*LINES[-2:], "half a line"]
        job.state = "RUNNING"
        assert read(JobServer(server.address), tail=0)[0] == ["half a line"]


@pytest.mark.parametrize(
    ("state", "code", "status", "words"),
    [
        ("SUCCEEDED", 0, 0, "succeeded"),
        ("FAILED", 1, 1, "failed with exit status 1"),
        ("FAILED", 130, 130, "exit status 130"),
        ("FAILED", 127, 1, "does not find the program `weaver-rl`"),
        ("FAILED", None, 1, "Ray does not say why"),
        ("STOPPED", None, 130, "was stopped"),
    ],
)
def test_the_exit_status_is_the_jobs(state: str, code: int | None, status: int, words: str):
    job = FakeJob(log=LOG, end_state=state, end_code=code)
    with serving(job) as server:
        look = read(JobServer(server.address))[2]
    assert exit_status(look) == status
    assert words in jobs.ending(look)


# -- submitting --------------------------------------------------------------------------------------------------------


def sent(tmp_path: Path, *overrides: str, **options: object) -> tuple[dict[str, object], FakeJob]:
    job = FakeJob()
    given = [f"run_dir={tmp_path / 'run'}", *overrides]
    with serving(job) as server:
        request = JobRequest(config_file=TINY, overrides=given, **{"env": {}, **options})  # type: ignore[arg-type]
        submit(JobServer(server.address), load_config(TINY, given), request, Console(file=io.StringIO()))
    return job.submitted[0], job


def test_a_job_is_the_run_with_its_files_and_time_to_end(tmp_path: Path):
    body, job = sent(
        tmp_path,
        "cluster.address=1.2.3.4:6379",
        "task.prompt_template=it is {question}",
        resume=True,
        env={"HF_HOME": "/models"},
    )
    assert body["entrypoint"] == (
        f"exec weaver-rl train tiny.yaml run_dir={tmp_path}/run cluster.address=1.2.3.4:6379 "
        "'task.prompt_template=it is {question}' base_dir=. cluster.address=null --resume"
    )
    environment = body["runtime_env"]
    assert isinstance(environment, dict)
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120", "HF_HOME": "/models"}
    ((name, package),) = job.packages.items()
    assert environment["working_dir"] == f"gcs://{name}"
    assert {"tiny.yaml", "tiny_rewards.py"} <= set(zipfile.ZipFile(io.BytesIO(package)).namelist())


def test_the_same_files_are_the_same_package(tmp_path: Path):
    assert list(sent(tmp_path)[1].packages) == list(sent(tmp_path)[1].packages)


@pytest.fixture
def _small_buffers() -> Iterator[None]:
    """What the server has not taken was hardly sent either."""
    option = (socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    HTTPConnection.default_socket_options.append(option)
    yield
    HTTPConnection.default_socket_options.remove(option)


def upload(job: FakeJob, tmp_path: Path) -> bytes:
    package = tmp_path / "package.zip"
    package.write_bytes(random.Random(0).randbytes(4 * 2**20))
    with serving(job) as server:
        JobServer(server.address).submit(entrypoint="true", job_id="new", package=package, env_vars={})
    return package.read_bytes()


@pytest.mark.usefixtures("_small_buffers")
def test_an_upload_may_take_as_long_as_it_makes_progress(tmp_path: Path, monkeypatch):
    for name in ("CONNECT_WITHIN_S", "ANSWER_WITHIN_S", "UPLOAD_STALLED_S"):
        monkeypatch.setattr(job_client, name, 0.8)
    job = FakeJob(upload_pause_s=0.03)
    began = time.monotonic()
    package = upload(job, tmp_path)
    assert time.monotonic() - began > 1
    assert list(job.packages.values()) == [package]
    (headers,) = [headers for headers in job.headers if headers.get("Content-Length") == str(len(package))]
    assert "Transfer-Encoding" not in headers


@pytest.mark.usefixtures("_small_buffers")
def test_an_upload_without_progress_is_given_up_and_the_address_is_not_blamed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(job_client, "UPLOAD_STALLED_S", 0.3)
    began = time.monotonic()
    with pytest.raises(JobServerLostError, match=r"upload of 4\.0 MB to http://\S+ did not finish") as error:
        upload(FakeJob(upload_pause_s=60), tmp_path)
    assert time.monotonic() - began < 3
    assert "--exclude" in str(error.value)
    assert "--address" not in str(error.value)


@pytest.mark.parametrize("where", ["runs/mine", "null", "~/runs"])
def test_a_run_folder_that_would_be_lost_is_refused(tmp_path: Path, where: str):
    with pytest.raises(ConfigError, match=r"relative: .* run_dir=/shared/tiny, or a URL"):
        sent(tmp_path, f"run_dir={where}")


def test_a_run_folder_that_is_a_url_is_none_of_this_machine(tmp_path: Path):
    assert "run_dir=s3://bucket/run" in str(sent(tmp_path, "run_dir=s3://bucket/run")[0]["entrypoint"])


def test_a_name_that_is_taken_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"--job-id {JOB}: there is such a job"):
        sent(tmp_path, job_id=JOB)


# -- the commands ------------------------------------------------------------------------------------------------------


def test_submit_validates_before_it_asks_anybody(monkeypatch, capsys, tmp_path: Path):
    assert command(monkeypatch, "submit", str(TINY), "num_stepz=3", "--address", "http://127.0.0.1:1") == 2
    assert "num_stepz: unknown key; did you mean 'num_steps'?" in capsys.readouterr().err


def test_ctrl_c_ends_the_following_and_not_the_job(monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupt)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    job = FakeJob(log=LOG)
    with serving(job) as server:
        assert command(monkeypatch, "logs", JOB, "--address", server.address) == 130
    printed = capsys.readouterr()
    assert f"job {JOB} goes on: `weaver-rl logs {JOB} --address {server.address}` follows it" in printed.out
    assert printed.err == ""
    assert job.state == "RUNNING"


def test_logs_without_following(monkeypatch, capsys):
    with serving(FakeJob(log=LOG)) as server:
        assert command(monkeypatch, "logs", JOB, "--address", server.address, "--no-follow", "--tail", "2") == 0
    assert capsys.readouterr().out.splitlines() == LINES[-2:]


@pytest.mark.parametrize(
    ("log", "words"),
    [(f"{LOG}{INTERRUPTED}\n", "has ended in good order"), (LOG, "was killed before it had ended by itself")],
)
def test_stop_says_how_the_job_ended(monkeypatch, capsys, log: str, words: str):
    job = FakeJob(log=log)
    with serving(job) as server:
        assert command(monkeypatch, "stop", JOB, "--address", server.address) == 0
        assert words in capsys.readouterr().out
        assert command(monkeypatch, "stop", JOB, "--address", server.address) == 0
    assert "was stopped already" in capsys.readouterr().out


def test_a_job_has_stopped_though_its_log_cannot_be_read(monkeypatch, capsys):
    with serving(FakeJob(log_is_lost=True)) as server:
        assert command(monkeypatch, "stop", JOB, "--address", server.address) == 0
    printed = capsys.readouterr()
    assert f"job {JOB} was stopped; whether in good order its log would say, which cannot be read" in printed.out
    assert "the agent is away" in printed.out
    assert printed.err == ""


def test_stop_does_not_wait_for_ever(monkeypatch, capsys):
    job = FakeJob(log=LOG, stops_when_asked=False)
    with serving(job) as server:
        assert command(monkeypatch, "stop", JOB, "--address", server.address, "--wait-s", "0.2") == 1
    assert "has not ended yet" in capsys.readouterr().out


def test_jobs_are_listed(monkeypatch, capsys):
    with serving(FakeJob()) as server:
        assert command(monkeypatch, "jobs", "--address", server.address) == 0
    assert "running" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_a_list_of_jobs_has_their_ids_whole_and_folds_only_what_they_do(monkeypatch, capsys, columns: str):
    looks = [
        job_client.JobLook(
            job_id=job_id,
            state="SUCCEEDED",
            message="",
            exit_code=0,
            started_at=1_767_225_600.0,
            ended_at=1_767_229_200.0,
            entrypoint=f"exec weaver-rl train {'long' * 30}.yaml run_dir=/shared/{job_id}",
        )
        for job_id in ("gsm8k_8gpu-1a2b3c4d", "a-name-of-sixty-characters-that-somebody-gave-by-hand-1a2b3c4")
    ]
    monkeypatch.setattr(JobServer, "jobs", lambda _: looks)
    monkeypatch.setenv("COLUMNS", columns)
    with serving(FakeJob()) as server:
        assert command(monkeypatch, "jobs", "--address", server.address) == 0
    printed = capsys.readouterr().out
    folded = "".join(line[printed.index("what") :] for line in printed.splitlines())
    for look in looks:
        assert f"{look.job_id} " in printed
        assert look.entrypoint.removeprefix("exec ").replace(" ", "") in folded.replace(" ", "")
    assert printed.count(jobs_command._clock(looks[0].started_at)) == 2
    assert "…" not in printed


def test_an_unknown_job_is_one_message(monkeypatch, capsys):
    with serving(FakeJob()) as server:
        for name in ("logs", "stop"):
            assert command(monkeypatch, name, "other", "--address", server.address) == 2
            printed = capsys.readouterr().err
            assert f"{server.address} knows no job 'other'; `weaver-rl jobs --address {server.address}`" in printed
            assert "Traceback" not in printed


def test_a_dead_address_is_one_message_in_bounded_time(monkeypatch, capsys):
    monkeypatch.setattr(job_client, "CONNECT_WITHIN_S", 0.5)
    monkeypatch.setattr(job_client, "ANSWER_WITHIN_S", 0.5)
    with socket.socket() as deaf:  # it takes connections and never says a word
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            closed = probe.getsockname()[1]
        for port in (deaf.getsockname()[1], closed):
            began = time.monotonic()
            assert command(monkeypatch, "jobs", "--address", f"http://127.0.0.1:{port}") == 2
            assert time.monotonic() - began < 3
            printed = capsys.readouterr().err
            assert printed.startswith(f"error: no job server answers at http://127.0.0.1:{port}")
            assert "http://HEAD:8265" in printed
            assert printed.count("\n") == 1


def test_a_server_that_wants_a_token_says_how_to_give_it(monkeypatch, capsys):
    with serving(FakeJob(token="secret")) as server:
        assert command(monkeypatch, "jobs", "--address", server.address) == 2
        assert "asks for a token" in capsys.readouterr().err
        monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"Authorization": "Bearer secret"}))
        assert command(monkeypatch, "jobs", "--address", server.address) == 0


def test_what_the_option_says_counts_and_not_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with serving(FakeJob()) as server:
        assert command(monkeypatch, "jobs", "--address", server.address) == 0
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
        assert command(monkeypatch, "jobs") == 0


def test_an_unknown_job_is_an_error_of_its_own():
    with serving(FakeJob()) as server, pytest.raises(UnknownJobError):
        JobServer(server.address).look("other")


@pytest.mark.parametrize("option", ["A B=1", "=1", "NOT_SET_HERE"])
def test_a_variable_that_is_none_is_refused(monkeypatch, capsys, option: str):
    assert command(monkeypatch, "submit", str(TINY), "--env", option) == 2
    assert "--env" in capsys.readouterr().err
