"""The disks of the cache folder and of the store: which file system, how much room, how fast."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_moe.doctor.check import Check, format_rate, judge
from offload_moe.sizes import format_size
from offload_moe.store import Store
from offload_moe.store.durable import write_at
from offload_moe.store.reading import forget_cached
from offload_moe.tiers.arena import Arena
from offload_moe.tiers.disk import readers_for
from offload_moe.tiers.record_file import RecordFile

FILE_BYTES = 128 << 20
BLOCK_BYTES = 4 << 20  # a small expert
NUM_READERS = readers_for(BLOCK_BYTES)
MEASURE_S = 1.0
LITTLE_SPACE = 20 << 30
SLOW_BYTES_PER_S = 1e9
VERY_SLOW_BYTES_PER_S = 150e6
REMOTE = ("nfs", "cifs", "smb", "9p", "v9fs", "drvfs", "fuse.sshfs", "fuse.rclone", "virtiofs")
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """is_direct: the page cache was out of the way."""

    bytes_per_s: float
    is_direct: bool


def check_file_system(name: str, folder: Path) -> Check:
    """name: what lies there, such as `cache folder`."""
    folder = existing(folder)
    kind = file_system(folder)
    free = shutil.disk_usage(folder).free
    found = f"{kind}, {format_size(free)} free"
    problem = warning = ""
    move = "Set OFFLOAD_MOE_CACHE to a folder on a local NVMe disk."
    if not os.access(folder, os.W_OK):
        problem = f"It cannot be written. {move}"
    elif kind.startswith(REMOTE):
        warning = f"Experts would come over a network or a virtual machine's border. {move}"
    elif kind in IN_MEMORY:
        warning = f"It lies in RAM and is gone after a restart. {move}"
    elif free < LITTLE_SPACE:
        warning = f"Few models fit. Free some space (`offload-moe list`), or: {move}"
    return judge(name, found, problem=problem, warning=warning, numbers={"free_bytes": free})


def file_system(folder: Path) -> str:
    """`ext4`, `btrfs`, `nfs4` ...; `unknown` when no mount says."""
    real = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_disk_speed(folder: Path, store: Store | None = None) -> Check:
    """Reads as the engine reads experts: the store's own, or a temporary file's."""
    name = "disk read"
    files = sorted(store.path.glob("experts-*.safetensors"), key=lambda path: path.stat().st_size) if store else []
    if files and files[-1].stat().st_size >= FILE_BYTES:
        return _judge_speed(name, measure_read(files[-1]))
    folder = existing(store.path if store else folder)
    if shutil.disk_usage(folder).free < 8 * FILE_BYTES:
        return judge(name, "not measured", warning=f"Free {format_size(8 * FILE_BYTES)} for a temporary file.")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offload-moe-doctor-") as file:
        block = os.urandom(BLOCK_BYTES)
        for offset in range(0, FILE_BYTES, BLOCK_BYTES):
            write_at(file.fileno(), block, offset)
        os.fsync(file.fileno())
        return _judge_speed(name, measure_read(Path(file.name)))


def measure_read(path: Path, clock: Callable[[], float] = time.perf_counter) -> DiskSpeed:
    """Several blocks in flight around the page cache, for about a second. path: of at least one block.

    Raises: TransferError.
    """
    num_blocks = path.stat().st_size // BLOCK_BYTES
    arena = Arena(NUM_READERS, BLOCK_BYTES)
    with closing(RecordFile(path)) as file:
        if not file.is_direct:
            forget_cached(path)
        num_read = 0
        begun = clock()

        def read(reader: int) -> int:
            view = arena.slot(reader).numpy().data
            done = 0
            for block in range(reader, num_blocks, NUM_READERS):
                if clock() - begun > MEASURE_S:
                    break
                file.read_into(view, block * BLOCK_BYTES)
                done += 1
            return done

        with ThreadPoolExecutor(NUM_READERS) as pool:
            while num_read == 0 or (file.is_direct and clock() - begun < MEASURE_S / 2):
                num_read += sum(pool.map(read, range(NUM_READERS)))
        elapsed_s = clock() - begun
        return DiskSpeed(bytes_per_s=num_read * BLOCK_BYTES / elapsed_s, is_direct=file.is_direct)


def _judge_speed(name: str, speed: DiskSpeed) -> Check:
    how = "direct" if speed.is_direct else "through the page cache: this file system has no direct reads"
    found = f"{format_rate(speed.bytes_per_s)}, {how}, {NUM_READERS} reads of {format_size(BLOCK_BYTES)} in flight"
    problem = warning = ""
    if speed.bytes_per_s < VERY_SLOW_BYTES_PER_S:
        problem = "Missed experts would take seconds per token. Put the store on an SSD: set OFFLOAD_MOE_CACHE."
    elif speed.bytes_per_s < SLOW_BYTES_PER_S:
        warning = "Slower than an NVMe disk. Give more RAM to the experts, or put the store on a faster disk."
    return judge(name, found, problem=problem, warning=warning, numbers={"disk_bytes_per_s": speed.bytes_per_s})
