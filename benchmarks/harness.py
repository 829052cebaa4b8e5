"""What every benchmark shares: alternated trials, medians with their spread, the machine, one JSON line at the end.

Needs the standard library only: peers import it in environments of their own.
"""

import argparse
import json
import math
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy")
# Hot on purpose: with random weights, greedy decoding repeats one token and so one set of experts.
HOT_SAMPLING: dict[str, Any] = {"temperature": 50.0, "top_k": 0, "top_p": 1.0}
CGROUP = Path("/sys/fs/cgroup/memory")  # version 1, whose limit counts the page cache too


def alternate(
    candidates: Mapping[str, Callable[[], float]], *, num_trials: int = 5, num_warmups: int = 1
) -> dict[str, list[float]]:
    """Run every candidate once per trial, in turn, so that a machine whose speed drifts treats them alike.

    A candidate returns its own figure (seconds, or tokens per second). The warm-ups are not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(num_warmups + num_trials):
        for name, run in candidates.items():
            value = run()
            if trial >= num_warmups:
                values[name].append(value)
    return values


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(values: Mapping[str, list[float]], name: str, other: str) -> dict[str, float]:
    """`name` over `other`, trial by trial: what is quoted, because absolute times of a shared machine mean little."""
    return spread([a / b for a, b in zip(values[name], values[other], strict=True)])


def pin_threads(num_threads: int) -> None:
    """One core per thread, for us and for OpenMP; call it before torch is imported."""
    bind_to_cores(num_threads)
    cores = sorted(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, cores))


def bind_to_cores(num_cores: int) -> None:
    """Keep this process and its threads on the first cores, as every peer is kept."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def runnable_sets(names: list[str]) -> list[str]:
    """Those of the kernel sets that this machine runs."""
    from offload_moe.errors import ConfigError
    from offload_moe.native import kernels

    found = []
    for name in names:
        try:
            kernels.select_instruction_set(name)
        except ConfigError:
            continue
        found.append(name)
    kernels.select_instruction_set(None)
    return found


def io_bytes() -> dict[str, int]:
    """What this process has read from disk and written to it so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"from_disk": int(fields["read_bytes"]), "to_disk": int(fields["write_bytes"])}


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Of this process alone: unlike `ru_maxrss`, the high-water mark starts anew with the program."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def prompt_ids(seed: int, num_tokens: int) -> list[int]:
    """The prompt that every engine reads, for vocabularies of more than 20,300 tokens."""
    return [(index * 37 + seed * 101) % 20000 + 300 for index in range(num_tokens)]


def make(script: str, config: Path, target: Path, *arguments: str) -> None:
    """Run one of the makers, unless its result is there."""
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        run_json([sys.executable, str(HERE / script), str(config), str(part), *arguments], timeout_s=None)
        part.rename(target)


def has_llamacpp() -> bool:
    """Whether the peer is installed; says so where it is not."""
    is_here = find_spec("xllamacpp") is not None
    if not is_here:
        print("llama.cpp is not here, so it is left out: pip install xllamacpp", file=sys.stderr)
    return is_here


def runner_arguments(description: str) -> argparse.ArgumentParser:
    """What every process takes that runs one store."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--ram", default=None)
    parser.add_argument("--policy", default=None)
    parser.add_argument("--prefetch", type=int, default=None)
    return parser


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "instruction_set": _instruction_set() if find_spec("offload_moe") else None,
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "commit": _commit(),
        **{package: version(package) for package in PACKAGES if find_spec(package)},
    }


def finish(document: Mapping[str, Any]) -> None:
    """Print the result as the last line of stdout; what is infinite or not a number is null, which JSON knows."""
    sys.stdout.flush()
    print(json.dumps(_as_json({**document, "machine": machine()}), allow_nan=False))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _instruction_set() -> str:
    """What the native kernels use here. Imports no torch, for a peer has none."""
    from offload_moe.native.library import load_library

    library = load_library()
    library.om_select(os.environ.get("OFFLOAD_MOE_KERNEL", "").encode())  # as every process that we started did
    return str(library.om_active_name().decode())


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def can_limit_memory() -> bool:
    """Whether `run_json` can put a process into a memory cgroup of its own, which needs root; says so if not."""
    can = os.access(CGROUP / "memory.limit_in_bytes", os.R_OK) and os.access(CGROUP, os.W_OK)
    if not can:
        print(f"{CGROUP} cannot be written, so the memory limit is not enforced: cgroup v1 and root", file=sys.stderr)
    return can


def run_json(
    command: Sequence[str], *, memory_limit: int | None = None, timeout_s: float | None = 1800
) -> dict[str, Any]:
    """Run a benchmark process, optionally in a memory cgroup of its own, and read its last line; the machine is ours.

    Raises: RuntimeError with the end of stderr when it failed.
    """
    with _memory_group(memory_limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, preexec_fn=enter)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {run.returncode}: {run.stderr[-2000:]}")
    document = dict(json.loads(run.stdout.strip().splitlines()[-1]))
    document.pop("machine", None)
    return document


@contextmanager
def _memory_group(limit: int | None) -> Iterator[Path | None]:
    """A cgroup whose limit counts the page cache too, so that a file larger than memory really is."""
    if limit is None:
        yield None
        return
    group = CGROUP / f"offload_moe_{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def forget_cached(folder_or_file: Path) -> None:
    """Drop files from the page cache: pages that another cgroup was charged for would not count against a limit."""
    files = folder_or_file.iterdir() if folder_or_file.is_dir() else [folder_or_file]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def random_read_bytes_per_s(path: Path, record_bytes: int, *, depth: int = 4, seconds: float = 3.0) -> float:
    """Random direct reads of records of this size, `depth` at once: what a disk tier cannot do better than."""
    num_records = path.stat().st_size // record_bytes - 1
    deadline = time.perf_counter() + seconds
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(seed: int) -> int:
        generator = random.Random(seed)
        buffer = mmap.mmap(-1, record_bytes)
        done = 0
        while time.perf_counter() < deadline:
            offset = generator.randrange(num_records) * record_bytes // 4096 * 4096
            done += os.preadv(descriptor, [buffer], offset)
        return done

    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(depth) as pool:
            total = sum(pool.map(read, range(depth)))
    finally:
        os.close(descriptor)
    return total / (time.perf_counter() - began)
