"""Saves and restores everything a rank needs to continue bit for bit. It knows files, no data and no losses.

Layout of a state directory: `weights/` a Hugging Face directory in float32; `optimizer/` AdamW's moments and step
counts as a sharded torch.distributed.checkpoint, loadable by any number of ranks; `rng/` each rank's generators;
`learner.json` what is there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
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

from weaver_rl.errors import CheckpointError
from weaver_rl.learner.export import save_hf_directory
from weaver_rl.learner.policy import Policy
from weaver_rl.learner.process_group import Ranks
from weaver_rl.learner.sharding import fill_parameters, persistent_buffers

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    directory: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    model_dir: Path,
    with_optimizer: bool,
) -> None:
    """Write the state; returns on every rank once all have written. The caller makes it durable and names it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_hf_directory(
        policy.model,
        directory / "weights",
        model_dir=model_dir,
        rank=ranks.rank,
        dtype=torch.float32,
        hub_names=False,
    )
    optimizer_state = _optimizer_state(policy, optimizer) if with_optimizer else {}
    if optimizer_state:
        writer = FileSystemWriter(directory / "optimizer")
        with _without_process_group_warning():
            save_sharded(optimizer_state, storage_writer=writer, no_dist=not ranks.in_group)
    (directory / "rng").mkdir(exist_ok=True)
    save_file(_rng_state(), _rng_path(directory, ranks.rank))
    if ranks.rank == 0:
        content = {"format": _FORMAT, "num_ranks": ranks.world_size, "optimizer": bool(optimizer_state)}
        (directory / "learner.json").write_text(json.dumps(content) + "\n")
    ranks.barrier()


def load(directory: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Restore what `save` wrote. A state without optimizer leaves AdamW as it is before its first step."""
    try:
        content = json.loads((directory / "learner.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} holds no readable learner state (learner.json): {error}") from error
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{directory} has state format {content.get('format')}, this version reads {_FORMAT}")
    try:
        moments = _read_optimizer(directory / "optimizer", policy, ranks) if content["optimizer"] else {}
        load_weights(directory / "weights", policy, ranks)
        optimizer.state.clear()
        optimizer.state.update(moments)
        if _rng_path(directory, ranks.rank).exists():
            _set_rng_state(load_file(_rng_path(directory, ranks.rank)))
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"cannot read the learner state in {directory}: {error}") from error
    ranks.barrier()


@torch.no_grad()
def load_weights(directory: Path, policy: Policy, ranks: Ranks) -> None:
    """Set the weights to those of a directory that `save` wrote; each rank reads only the rows it holds."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files |= dict.fromkeys(file.keys(), file)
        shapes = {name: tuple(parameter.shape) for name, parameter in policy.model.named_parameters()}
        for name, shape in shapes.items():
            seen = tuple(files[name].get_slice(name).get_shape()) if name in files else "nothing"
            if seen != shape:
                raise CheckpointError(f"{directory}: weight {name} must have shape {shape}, seen {seen}")

        def read(name: str, rows: slice) -> torch.Tensor:
            part: torch.Tensor = files[name].get_slice(name)[rows] if shapes[name] else files[name].get_tensor(name)
            return part

        fill_parameters(policy.model, ranks, read)
        for name, buffer in persistent_buffers(policy.model):
            buffer.copy_(files[name].get_tensor(name))


def _optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in policy.model.named_parameters()
        if parameter in optimizer.state
        for key in (*_MOMENTS, "step")
    }


def _read_optimizer(directory: Path, policy: Policy, ranks: Ranks) -> dict[torch.Tensor, dict[str, Any]]:
    reader = FileSystemReader(directory)
    saved = reader.read_metadata().state_dict_metadata
    stepped = {name: parameter for name, parameter in policy.model.named_parameters() if f"step.{name}" in saved}
    flat: dict[str, Any] = {}
    for name, parameter in stepped.items():
        # Fused AdamW keeps step counts on the device of the parameter.
        flat[f"step.{name}"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        flat |= {f"{key}.{name}": torch.zeros_like(parameter) for key in _MOMENTS}
    with _without_process_group_warning():
        load_sharded(flat, storage_reader=reader, no_dist=not ranks.in_group)
    return {
        parameter: {key: flat[f"{key}.{name}"] for key in (*_MOMENTS, "step")} for name, parameter in stepped.items()
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


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
