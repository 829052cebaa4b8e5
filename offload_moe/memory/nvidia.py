"""What NVIDIA's driver reports, without torch, whose build may lack CUDA."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/driver/nvidia/version")
WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"
TIMEOUT_S = 10.0
FIELDS = ("name", "driver_version", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max")

Query = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvidia:
    """The driver, and its first card as `nvidia-smi` lists it; lanes are of the PCIe link."""

    driver: str | None = None
    name: str | None = None
    link_generation: int | None = None
    lanes: int | None = None
    max_lanes: int | None = None


def find_nvidia(proc: Path = PROC, query: Query | None = None) -> Nvidia | None:
    """The driver and its first card; None without an NVIDIA driver.

    query: runs `nvidia-smi` with these arguments and returns its output; None when it fails.
    """
    answer = (query or _query_tool)([f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"])
    if answer and answer.strip():
        values = [value.strip() for value in answer.strip().splitlines()[0].split(",")]
        if len(values) == len(FIELDS):
            name, driver, generation, lanes, max_lanes = values
            return Nvidia(
                driver=driver,
                name=name,
                link_generation=_number(generation),
                lanes=_number(lanes),
                max_lanes=_number(max_lanes),
            )
    return Nvidia(driver=_driver_of(proc)) if proc.exists() else None


def _query_tool(arguments: Sequence[str]) -> str | None:
    tool = shutil.which("nvidia-smi") or (WSL_TOOL if Path(WSL_TOOL).exists() else None)
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _driver_of(proc: Path) -> str | None:
    """`NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu ...` -> `550.54.14`."""
    words = proc.read_text(errors="replace").split()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
