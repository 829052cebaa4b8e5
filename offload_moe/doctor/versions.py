"""The installed versions, compared with the tested ones."""

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

import offload_moe
from offload_moe.doctor.check import Check, judge

DISTRIBUTION = "offload-moe"
SHOWN = ("torch", "transformers", "bitsandbytes", "safetensors", "huggingface-hub")


def check_program() -> Check:
    found = f"offload-moe {offload_moe.__version__}, Python {platform.python_version()}"
    too_old = sys.version_info < (3, 11)
    return judge("program", found, problem="Use Python 3.11 or newer." if too_old else "")


def check_packages() -> list[Check]:
    """One check per library that affects results or speed."""
    needed = {requirement.name: requirement for requirement in _requirements()}
    return [check_package(name, _installed(name), needed.get(name)) for name in SHOWN]


def check_package(name: str, version: str | None, needed: Requirement | None) -> Check:
    """needed: the tested range; None if unknown."""
    line = f'python -m pip install "{name}{needed.specifier if needed else ""}"'
    if version is None:
        return judge(name, "not installed", problem=f"Install it: {line}")
    if needed is None or needed.specifier.contains(Version(version), prereleases=True):
        return judge(name, version)
    found = f"{version}, tested with {needed.specifier}"
    return judge(name, found, warning=f"Results may differ from the tested versions: {line}")


def _requirements() -> list[Requirement]:
    """The package's own requirements; none in a source tree."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [requirement for line in lines if (requirement := Requirement(line)).marker is None]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
