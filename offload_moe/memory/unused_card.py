"""Why a card that is in the machine is not used, and what to do about it."""

import os
import platform
from collections.abc import Mapping

import torch

from offload_moe.memory.nvidia import Nvidia, find_nvidia


def build_of_torch() -> str | None:
    """What torch was built for beside the CPU: `CUDA 13.0`, `ROCm 7.0`, `XPU`; None for a CPU-only build."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return "XPU" if getattr(torch.version, "xpu", None) else None


def install_line(system: str) -> str:
    """How to replace a CPU-only torch by one for the card. The package index has CUDA builds for Linux only."""
    release = torch.__version__.partition("+")[0]
    if system == "Linux":
        return f'Install the CUDA build: python -m pip install --force-reinstall "torch=={release}"'
    return f"Install the CUDA build of torch {release}: pytorch.org/get-started/locally has the line for {system}."


def is_hidden(environ: Mapping[str, str] | None = None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every card."""
    hidden = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    return hidden is not None and not hidden.strip("-1, ")


def why_unused(build: str | None, system: str | None = None) -> str:
    """Why torch does not find the NVIDIA card of this machine, and the remedy. build: of `build_of_torch`."""
    if build is None:
        return f"This torch cannot use the GPU. {install_line(system or platform.system())}"
    return (
        f"torch does not see the GPU: the driver is older than {build} needs, or the container has no access. "
        "Update the driver; start a container with --gpus all."
    )


def notice_of_unused_card(nvidia: Nvidia | None = None, *, why: str | None = None) -> str | None:
    """The notice for a model that is about to run on the CPU; None where there is no card, or it is hidden.

    why: of the model; None where torch is the reason.
    """
    nvidia = nvidia or find_nvidia()
    if nvidia is None or is_hidden():
        return None
    return f"{nvidia.name or 'An NVIDIA GPU'} is not used. {why or why_unused(build_of_torch())}"
