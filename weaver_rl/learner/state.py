"""Saves and restores everything a rank needs to continue bit for bit. It knows files, no data and no losses.

Layout of a state directory: `weights/` in float32, a Hugging Face directory or, of an adapter, a PEFT directory;
`optimizer/` AdamW's moments and step counts as a sharded torch.distributed.checkpoint, loadable by any number of
ranks; `rng/` each rank's generators; `learner.json` what is there.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from weaver_rl.errors import CheckpointError, ConfigError, OtherRankError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.process_group import Ranks
from weaver_rl.learner.sharding import fill_tensors
from weaver_rl.learner.trained import Trained

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    directory: Path, trained: Trained, optimizer: torch.optim.Optimizer, ranks: Ranks, *, with_optimizer: bool
) -> None:
    """Write the state; returns on every rank once all have written. The caller makes it durable and names it."""
    directory.mkdir(parents=True, exist_ok=True)
    trained.save_weights(directory / "weights")
    optimizer_state = _optimizer_state(trained, optimizer) if with_optimizer else {}
    if optimizer_state:
        writer = FileSystemWriter(directory / "optimizer")
        with _without_process_group_warning():
            save_sharded(optimizer_state, storage_writer=writer, no_dist=not ranks.in_group)
    (directory / "rng").mkdir(exist_ok=True)
    save_file(_rng_state(), _rng_path(directory, ranks.rank))
    if ranks.rank == 0:
        content = {
            "format": _FORMAT,
            "num_ranks": ranks.world_size,
            "optimizer": bool(optimizer_state),
            "adapter": None if trained.config is None else dataclasses.asdict(trained.config),
        }
        (directory / "learner.json").write_text(json.dumps(content) + "\n")
    ranks.barrier()


def load(
    directory: Path, trained: Trained, optimizer: torch.optim.Optimizer, ranks: Ranks, *, with_optimizer: bool
) -> None:
    """Restore what `save` wrote; all or nothing, on all ranks or on none.

    AdamW is left as it is before its first step if the state has no optimizer or `with_optimizer` is False.
    """
    with ExitStack() as stack:
        refusal: CheckpointError | None = None
        try:
            content = _read_content(directory, trained)
            saved = stack.enter_context(_SavedTensors(directory / "weights"))
            saved.check(dict(trained.tensors_in_files()))
            with_optimizer = with_optimizer and content["optimizer"]
            reader = _OptimizerReader(directory / "optimizer") if with_optimizer else None
            rng = load_file(_rng_path(directory, ranks.rank)) if _rng_path(directory, ranks.rank).exists() else {}
        except CheckpointError as error:
            refusal = error
        except (OSError, SafetensorError, CheckpointException) as error:
            refusal = _unreadable(directory, error)
        ranks.agree(refusal, OtherRankError("another rank refused the learner state; its own error says why"))
        try:
            moments = reader.read(trained, ranks) if reader is not None else {}
        except (OSError, CheckpointException) as error:
            raise _unreadable(directory, error) from None
        fill_tensors(trained.tensors_in_files(), ranks, saved.read)
    optimizer.state.clear()
    optimizer.state.update(moments)
    _set_rng_state(rng)
    ranks.barrier()


class _SavedTensors:
    """The tensors in all safetensors files of a directory; each is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _SavedTensors:
        for path in sorted(self._directory.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def check(self, wanted: Mapping[str, torch.Tensor]) -> None:
        """Raise CheckpointError unless there is a tensor of the same shape for each one wanted."""
        for name, tensor in wanted.items():
            seen = self._shape(name) if name in self._files else "nothing"
            if seen != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self._directory}: weight {name} must have shape {tuple(tensor.shape)}, seen {seen}"
                )

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """The rows of one tensor."""
        file = self._files[name]
        part: torch.Tensor = file.get_slice(name)[rows] if self._shape(name) else file.get_tensor(name)
        return part

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())


class _OptimizerReader:
    """AdamW's state in a directory; made on each rank alone, read by all together."""

    def __init__(self, directory: Path) -> None:
        self._reader = FileSystemReader(directory)
        self._saved = self._reader.read_metadata().state_dict_metadata

    def read(self, trained: Trained, ranks: Ranks) -> dict[torch.Tensor, dict[str, Any]]:
        """The state of each parameter that has one, not set yet."""
        stepped = {name: parameter for name, parameter in trained.named_parameters() if f"step.{name}" in self._saved}
        flat: dict[str, Any] = {}
        for name, parameter in stepped.items():
            # Fused AdamW keeps step counts on the device of the parameter.
            flat[f"step.{name}"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            flat |= {f"{key}.{name}": torch.zeros_like(parameter) for key in _MOMENTS}
        with _without_process_group_warning():
            load_sharded(flat, storage_reader=self._reader, no_dist=not ranks.in_group)
        return {
            parameter: {key: flat[f"{key}.{name}"] for key in (*_MOMENTS, "step")}
            for name, parameter in stepped.items()
        }


def _read_content(directory: Path, trained: Trained) -> dict[str, Any]:
    """What is in the state; refused unless it is of the kind that is trained here."""
    try:
        content: dict[str, Any] = json.loads((directory / "learner.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} holds no readable learner state (learner.json): {error}") from error
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{directory} has state format {content.get('format')}, this version reads {_FORMAT}")
    try:
        adapter = AdapterConfig(**content["adapter"]) if content.get("adapter") else None
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{directory} holds no readable learner state (adapter): {error}") from error
    if _without_seed(adapter) != _without_seed(trained.config):
        saved, here = (str(config or "the whole policy") for config in (adapter, trained.config))
        raise CheckpointError(f"{directory} holds the state of {saved}, this learner trains {here}")
    return content


def _without_seed(adapter: AdapterConfig | None) -> AdapterConfig | None:
    """Where an adapter began makes no difference to how it goes on."""
    return adapter and dataclasses.replace(adapter, seed=0)


def _unreadable(directory: Path, error: BaseException) -> CheckpointError:
    unreadable = CheckpointError(f"cannot read the learner state in {directory}: {error}")
    unreadable.__cause__ = error
    return unreadable


def _optimizer_state(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in trained.named_parameters()
        if parameter in optimizer.state
        for key in (*_MOMENTS, "step")
    }


@contextmanager
def _without_process_group_warning() -> Iterator[None]:
    """A learner of one rank has no process group on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _rng_path(directory: Path, rank: int) -> Path:
    return directory / "rng" / f"rank-{rank:05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
