"""The files of the page: style sheets, scripts, frame. It knows where they lie and not what they say."""

from __future__ import annotations

import importlib.resources


def text(name: str) -> str:
    """One file of the folder `page`."""
    return importlib.resources.files("weaver_rl.report").joinpath("page", name).read_text(encoding="utf-8")
