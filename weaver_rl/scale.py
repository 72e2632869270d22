"""How many samplers a running run should have: a wish left in its folder, and who follows it. It starts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weaver_rl.errors import UserError
from weaver_rl.run_folder import RunFolder, write_atomically
from weaver_rl.terminal import LiveView

LOOK_EVERY_S = 1.0


def ask_for_samplers(folder: RunFolder, num_samplers: int) -> None:
    """Leaves the wish for a live run. Raises UserError where there is none, or for fewer than one."""
    if num_samplers < 1:
        raise UserError(f"--samplers is {num_samplers}; a run needs at least 1")
    if not folder.holds_run():
        raise UserError(f"{folder.path} holds no run")
    if not folder.is_claimed():
        raise UserError(f"{folder.path}: no process holds this run; start it with --resume sampler.num_replicas=…")
    write_atomically(folder.scale_file, f"{num_samplers}\n")


def wished_samplers(folder: RunFolder) -> int | None:
    """The wish, None without one. A wish that is no number is none: only `ask_for_samplers` writes the file."""
    try:
        return int(folder.scale_file.read_text())
    except (FileNotFoundError, ValueError):
        return None


async def follow_scale(folder: RunFolder, scale: Callable[[int], None], view: LiveView) -> None:
    """Passes each new wish on, for as long as the run lasts."""
    followed: int | None = None
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        wish = await asyncio.to_thread(wished_samplers, folder)
        if wish is not None and wish != followed:
            followed = wish
            view.note(f"asked for {wish} samplers")
            scale(wish)
