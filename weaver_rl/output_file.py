"""A file that a user names for a command to write. It does not know what is written."""

from __future__ import annotations

import os
from pathlib import Path

from weaver_rl.errors import ConfigError


def output_file(path: Path) -> Path:
    """The file itself, where links lead to one: what is written aside is put in its place by renaming.

    Raises:
        ConfigError: something other than a file is there. A rename would put a file in the place of a device.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file that can be replaced; name a file, which need not be there yet")
    return Path(os.path.realpath(path))
