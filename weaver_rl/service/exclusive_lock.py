"""A file that one process holds, for as long as it lives. It does not know what the file guards."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from weaver_rl.errors import ConfigError


class ExclusiveLock:
    """Held from its making to `release`, or to the death of the process, however that died.

    Raises:
        ConfigError: somebody else holds it (named), or the file cannot be written.
    """

    def __init__(self, path: Path, guarded: str) -> None:
        """`guarded` is what the error calls the thing: "state_dir /data/weaver"."""
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise ConfigError(f"{guarded} cannot be used: {path.name} cannot be written ({error.strerror})") from error
        try:
            # flock, not lockf: it belongs to the open file, so this process is refused a second one as well.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise ConfigError(f"{guarded} cannot be locked ({error.strerror}); give another `state_dir`") from error
            raise ConfigError(
                f"{guarded} is in use by {holder}; stop that server, or give this one another `state_dir`"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
