"""The configuration of a server: composes its sections. It imports nothing heavy and starts nothing."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator

from weaver_rl.engines.config import SamplerConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.models.config import ModelConfig, ScratchModel
from weaver_rl.placement import ClusterConfig
from weaver_rl.section import Section
from weaver_rl.service.records import TrainingMode
from weaver_rl.tasks.config import TaskConfig


class ServedModel(Section):
    """One base model of the lineup and the actors behind it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", max_length=200)
    """What clients call it (`base_model`)."""
    model: ModelConfig
    """Where its weights come from: scratch, a directory or a hub id."""
    task: TaskConfig | None = None
    """Whose texts train the tokenizer of a scratch model; no other model needs one."""
    training_modes: tuple[TrainingMode, ...] = Field(default=("lora", "full_ft"), min_length=1)
    """What clients may train of it."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence at most, for training and sampling; null: what the model was made for."""
    tokenizer_path: str | None = None
    """What clients give to `AutoTokenizer.from_pretrained`: a hub id, or a path on their machine; null: the directory
    of the model on the server, which is right for clients on the same machine or file system."""
    max_lora_rank: int = Field(default=64, ge=1, le=512)
    """Largest rank of an adapter."""
    max_loras: int = Field(default=8, ge=1)
    """Different adapters in one batch of the engine; more of them wait for a step. Each takes memory."""
    max_full_ft_models: int = Field(default=1, ge=1)
    """Models trained whole at a time; each has a learner of its own, and an engine once it is sampled from."""
    preload: bool = True
    """Start learner and engine of the base with the server; false: when the first client needs them."""
    learner: LearnerConfig = LearnerConfig()
    """The learner's processes; learning rate, schedule and Adam come from the client with each step."""
    sampler: SamplerConfig = SamplerConfig()
    """The engines."""

    @model_validator(mode="after")
    def _check(self) -> ServedModel:
        if isinstance(self.model, ScratchModel) and self.task is None:
            raise ValueError(f"model {self.name!r} is scratch: it needs a task whose texts train its tokenizer")
        if self.sampler.num_replicas != 1:
            raise ValueError(
                f"sampler.num_replicas is {self.sampler.num_replicas}: a server runs one engine for each base model; "
                "raise sampler.tensor_parallel or sampler.engine_args.max_num_seqs instead"
            )
        return self


class HttpConfig(Section):
    """The HTTP face."""

    host: str = "127.0.0.1"
    """Address to listen on. Without API keys only a loopback address is allowed."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port, printed at the start."""
    public_url: str | None = None
    """How clients reach the server, for download links; null: as the request came."""
    max_body_mb: int = Field(default=1024, ge=1)
    """Largest body of a forward or forward_backward (MiB), JSON or tensor pack, also decompressed; others: 4 MiB."""
    max_bodies_mb: int = Field(default=4096, ge=1)
    """Bodies of all requests in flight together (MiB); one for which there is no room is answered with 429."""
    long_poll_s: float = Field(default=20.0, ge=0, le=30)
    """How long a poll of an operation that has not ended may be held."""
    submit_grace_s: float = Field(default=0.1, ge=0, le=1)
    """How long the answer to a submission may wait for the operation to end, which saves short ones a poll."""
    decode_workers: int = Field(default=1, ge=1)
    """Processes that decode large bodies."""

    @model_validator(mode="after")
    def _one_body_fits(self) -> HttpConfig:
        if self.max_bodies_mb < self.max_body_mb:
            raise ValueError(
                f"max_bodies_mb is {self.max_bodies_mb} and max_body_mb {self.max_body_mb}: all bodies together must "
                "have room for one"
            )
        return self


class AuthConfig(Section):
    """Who may call."""

    keys_file: Path | None = None
    """Lines of `name: key`. Keys can also come from the environment: WEAVER_RL_API_KEYS="name:key,name:key"."""


class LimitsConfig(Section):
    """What one API key may use at a time."""

    requests_per_s: float = Field(default=1000.0, gt=0)
    """Requests of a key a second, on average."""
    burst: int = Field(default=2000, ge=1)
    """Requests of a key at once."""
    operations_in_flight: int = Field(default=4096, ge=1)
    """Operations of a key that have not ended."""
    models: int = Field(default=64, ge=1)
    """Active models of a key."""
    num_samples: int = Field(default=256, ge=1)
    """Completions of one sample request."""


class OperationsConfig(Section):
    """How operations are ordered and kept."""

    reorder_wait_s: float = Field(default=5.0, ge=0)
    """How long an operation waits for a missing earlier `seq_id`; not counted while a request of the model arrives."""
    keep_s: float = Field(default=86400.0, gt=0)
    """How long results stay readable after the end of an operation."""
    repeat_within_s: float = Field(default=900.0, gt=0)
    """The same request with the same `seq_id` is taken for one sent twice within this time; later it is refused."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """An operation that takes longer fails."""


class RetentionConfig(Section):
    """When files and sessions go."""

    sweep_every_s: float = Field(default=30.0, gt=0)
    """How often what has expired is removed; no expired weights are served meanwhile."""
    sampling_session_idle_s: float = Field(default=86400.0, gt=0)
    """A sampling session that was not used for so long ends."""
    session_idle_s: float = Field(default=86400.0, gt=0)
    """A model whose client sent no heartbeat, and which ran no operation, for so long is terminated."""
    download_url_s: float = Field(default=3600.0, gt=0)
    """How long a download link works."""


class ServeConfig(Section):
    """A whole server, one file."""

    name: str = Field(default="weaver", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the server in its metrics."""
    state_dir: Path = Path("weaver_state")
    """Database, checkpoints and artifacts; absolute, or under the working directory. Every node must see it."""
    database: str | None = None
    """SQLAlchemy URL, `postgresql+psycopg://…` for example; null: SQLite in `state_dir`."""
    base_dir: Path | None = None
    """Where relative paths of models and tasks start; null: the directory of the configuration file."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of scratch models' tasks and of engines."""
    models: tuple[ServedModel, ...] = Field(min_length=1)
    """The lineup."""
    http: HttpConfig = HttpConfig()
    """The HTTP face."""
    auth: AuthConfig = AuthConfig()
    """Who may call."""
    limits: LimitsConfig = LimitsConfig()
    """What one API key may use at a time."""
    operations: OperationsConfig = OperationsConfig()
    """How operations are ordered and kept."""
    retention: RetentionConfig = RetentionConfig()
    """When files and sessions go."""
    cluster: ClusterConfig = ClusterConfig()
    """Which Ray cluster."""

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = [model.name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {', '.join(twice)} given twice; every model needs a name of its own")
        return self

    def served(self, name: str) -> ServedModel | None:
        """The model of that name."""
        return next((model for model in self.models if model.name == name), None)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
