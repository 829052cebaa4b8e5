"""What compiled kernels cost: registers and spills from ptxas' remarks, instructions from nvdisasm's listing."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

WARP = 32
READS_CODES = ("FIRST", "SECOND", "MLP_FIRST", "MLP_SECOND", "LINEAR")
SCHEDULERS = 4  # of a multiprocessor: instructions of warps per cycle
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_SECTION = re.compile(r"\.section\s+\.text\.(\w+)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a product's data sheet says."""

    architecture: int
    multiprocessors: int
    ghz: float
    gb_per_s: float


CARDS = {
    "RTX 2080 Ti": Card(architecture=75, multiprocessors=68, ghz=1.545, gb_per_s=616),
    "RTX 3060": Card(architecture=86, multiprocessors=28, ghz=1.777, gb_per_s=360),
    "RTX 3090": Card(architecture=86, multiprocessors=82, ghz=1.695, gb_per_s=936),
    "RTX 4090": Card(architecture=89, multiprocessors=128, ghz=2.52, gb_per_s=1008),
    "RTX 5090": Card(architecture=120, multiprocessors=170, ghz=2.407, gb_per_s=1792),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a kernel's, `target` where it is a branch."""

    at: int
    name: str
    target: int | None = None


def resources(remarks: str) -> dict[str, dict[str, int]]:
    """By kernel: registers, bytes of stack, of spills and of shared memory, from what `ptxas -v` says."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in remarks.splitlines():
        if entry := _ENTRY.search(line):
            name = entry[1]
        elif name and (spills := _SPILLS.search(line)):
            found[name] = {"stack": int(spills[1]), "spills": int(spills[2]) + int(spills[3])}
        elif name and (used := _USED.search(line)):
            found[name] |= {"registers": int(used[1]), "shared": int(used[2] or 0)}
            name = ""
    return found


def find_nvdisasm() -> str | None:
    """The disassembler, of the package `nvidia-cuda-nvdisasm` or of a toolkit."""
    packages = [Path(folder) / "nvidia/cu13/bin/nvdisasm" for folder in sys.path]
    return next((str(path) for path in packages if path.exists()), None) or shutil.which("nvdisasm")


def listing(cubin: Path, nvdisasm: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    command = [nvdisasm, "--print-code", "--no-dataflow", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return parse(done.stdout)


def parse(text: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[tuple[int, str, str]]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    name = ""
    for line in text.splitlines():
        if section := _SECTION.search(line):
            name = section[1]
            found[name] = []
        elif label := _LABEL.match(line):
            waiting.append(label[1])
        elif name and (instruction := _INSTRUCTION.match(line)):
            at = int(instruction[1], 16)
            labels |= dict.fromkeys(waiting, at)
            waiting = []
            found[name].append((at, instruction[2], instruction[3]))
    return {kernel: [_resolved(entry, labels) for entry in entries] for kernel, entries in found.items()}


def _resolved(entry: tuple[int, str, str], labels: dict[str, int]) -> Instruction:
    at, name, operands = entry
    label = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
    return Instruction(at, name, labels.get(label[0]) if label else None)


def is_code_load(instruction: Instruction) -> bool:
    """A load of 16 bytes that keeps nothing in the first cache: codes, which are read once."""
    parts = instruction.name.split(".")
    return parts[0] == "LDG" and "128" in parts and "NA" in parts


def inner_loop(instructions: list[Instruction], *, least_loads: int = 1) -> list[Instruction]:
    """The shortest loop that loads codes, or everything where there is no such loop."""
    backward = [i for i in instructions if i.target is not None and i.target < i.at]
    for branch in sorted(backward, key=lambda i: i.at - (i.target or 0)):
        body = [i for i in instructions if (branch.target or 0) <= i.at <= branch.at]
        if sum(map(is_code_load, body)) >= least_loads:
            return body
    return instructions


def costs(instructions: list[Instruction]) -> dict[str, int]:
    """Instructions of the loop over codes, bytes of codes that a warp loads in it, and its loads by width."""
    body = inner_loop(instructions)
    loads = Counter(_width(i) for i in body if i.name.split(".")[0] in ("LDG", "LD"))
    return {
        "instructions": len(body),
        "code_bytes": sum(map(is_code_load, body)) * 16 * WARP,
        "loop_spills": sum(i.name.split(".")[0] in ("LDL", "STL") for i in body) if body is not instructions else 0,
        "generic_loads": sum(i.name.split(".")[0] == "LD" for i in body),
        **{f"loads_{width}": count for width, count in sorted(loads.items())},
    }


def _width(instruction: Instruction) -> int:
    """Bytes that a lane loads."""
    parts = instruction.name.split(".")
    return next(
        (
            size
            for word, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
            if word in parts
        ),
        4,
    )


def issue_bound(card: Card, cost: dict[str, int]) -> float:
    """GB of codes per second that the card's schedulers can issue the loop for."""
    return card.multiprocessors * SCHEDULERS * card.ghz * cost["code_bytes"] / cost["instructions"]


# By rows of activations: registers of a thread that leave two blocks of 256 threads on a multiprocessor, or one.
MOST_REGISTERS = {1: 128, 2: 168, 4: 208, 8: 255}
KEEPS_COLUMNS = ("DELTA",)  # of a state, in registers: one block on a multiprocessor
MOST_OF_SUPERBLOCKS = {1: 128, 2: 168, 4: 255, 8: 255}  # of GGUF's types, which have two sums for each row
SUPERBLOCKS = ("OM_Q4_K", "OM_Q6_K")
# Left where a number of resident thread blocks is set: bytes of a thread, and accesses in the loop over codes.
MOST_SPILLS, MOST_LOOP_SPILLS = 40, 1


def problems(kind: str, rows: int, cost: dict[str, int], codec: str = "") -> list[str]:
    """What is wrong with a kernel. codec: of its matrices, by its name in the kernels."""
    ceilings = MOST_OF_SUPERBLOCKS if codec in SUPERBLOCKS else MOST_REGISTERS
    found, most = [], ceilings[8 if kind in KEEPS_COLUMNS else rows]
    if cost["spills"] > MOST_SPILLS:
        found.append(f"{cost['spills']} bytes of spills")
    if cost.get("loop_spills", 0) > MOST_LOOP_SPILLS:
        found.append(f"{cost['loop_spills']} spills in the loop over codes")
    if cost["registers"] > most:
        found.append(f"{cost['registers']} registers, more than {most}")
    if kind in READS_CODES and "instructions" in cost and not cost["code_bytes"]:
        found.append("its codes are not loaded 16 bytes at a time")
    return found
