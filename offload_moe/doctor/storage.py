"""The disks of the cache folder and of the store: file system, free space, speed."""

import os
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from offload_moe.doctor.check import Check, format_rate, judge
from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import readers_for
from offload_moe.memory.record_file import RecordFile
from offload_moe.native.kernels import DONE, PlaceStruct, Reads, ReadSizes, SlotTable
from offload_moe.store import Store
from offload_moe.store.durable import write_at
from offload_moe.store.reading import forget_cached
from offload_moe.system.sizes import format_size

FILE_BYTES, LEAST_FILE_BYTES = 1 << 30, 128 << 20  # of the temporary file: larger than a disk's own cache
PIECE_BYTES = 64 << 20  # written and flushed at once
WRITE_S = 5.0  # limit of the time for writing the file
BLOCK_BYTES = 4 << 20  # a small expert
NUM_READERS = readers_for(BLOCK_BYTES)
MEASURE_S = 1.0
SPARE = 4  # required free space, as a multiple of the file
LITTLE_SPACE = 20 << 30
SLOW_BYTES_PER_S = 1e9
VERY_SLOW_BYTES_PER_S = 150e6
REMOTE = ("nfs", "cifs", "smb", "9p", "v9fs", "drvfs", "fuse.sshfs", "fuse.rclone", "virtiofs")
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """A measured read rate.

    is_direct: reads bypassed the page cache. file_bytes: of the file that was read at random places.
    """

    bytes_per_s: float
    is_direct: bool
    file_bytes: int


def check_file_system(name: str, folder: Path) -> Check:
    """Check the file system of a folder.

    name: the role of the folder, such as `cache folder`.
    """
    folder = existing(folder)
    kind = file_system(folder)
    free = shutil.disk_usage(folder).free
    found = f"{kind}, {format_size(free)} free"
    problem = warning = ""
    move = "Set OFFLOAD_MOE_CACHE to a folder on a local NVMe disk."
    if not os.access(folder, os.W_OK):
        problem = f"It cannot be written. {move}"
    elif kind.startswith(REMOTE):
        warning = f"Experts would be read over a network or from a virtual machine's host. {move}"
    elif kind in IN_MEMORY:
        warning = f"It lies in RAM and is gone after a restart. {move}"
    elif free < LITTLE_SPACE:
        warning = f"Few models fit. Free some space (`offload-moe list`), or: {move}"
    return judge(name, found, problem=problem, warning=warning, numbers={"free_bytes": free})


def file_system(folder: Path) -> str:
    """`ext4`, `btrfs`, `nfs4` ...; `unknown` if no mount matches."""
    real = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def existing(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_disk_speed(folder: Path, store: Store | None = None) -> Check:
    """Read in the same way as the engine reads experts, from the store or a temporary file."""
    name = "disk read"
    files = sorted(store.path.glob("experts-*.safetensors"), key=lambda path: path.stat().st_size) if store else []
    if files and files[-1].stat().st_size >= LEAST_FILE_BYTES:
        return _judge_speed(name, measure_read(files[-1]))
    folder = existing(store.path if store else folder)
    if shutil.disk_usage(folder).free < SPARE * FILE_BYTES:
        return judge(name, "not measured", warning=f"Free {format_size(SPARE * FILE_BYTES)} for a temporary file.")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offload-moe-doctor-") as file:
        write_noise(file.fileno())
        return _judge_speed(name, measure_read(Path(file.name)))


def write_noise(descriptor: int, clock: Callable[[], float] = time.perf_counter) -> None:
    """Write incompressible bytes, for a few seconds at most but at least a minimum."""
    begun, noise = clock(), np.random.default_rng()
    for offset in range(0, FILE_BYTES, PIECE_BYTES):
        if offset >= LEAST_FILE_BYTES and clock() - begun > WRITE_S:
            break
        write_at(descriptor, noise.bytes(PIECE_BYTES), offset)
        os.fsync(descriptor)


def measure_read(path: Path, clock: Callable[[], float] = time.perf_counter) -> DiskSpeed:
    """Read several blocks concurrently past the page cache, in random order and each once, for a second at most.

    path: a file of at least one block. Raises: OSError, TransferError.
    """
    num_bytes = path.stat().st_size
    order = random.sample(range(num_bytes // BLOCK_BYTES), num_bytes // BLOCK_BYTES)
    with closing(RecordFile(path, uses_cached=False)) as file:
        if not file.is_direct:
            forget_cached(path)
        begun = clock()
        num_read = _read_blocks(file, order, lambda: clock() - begun > MEASURE_S)
        rate = num_read * BLOCK_BYTES / (clock() - begun)
        return DiskSpeed(bytes_per_s=rate, is_direct=file.is_direct, file_bytes=num_bytes)


def _read_blocks(file: RecordFile, order: Sequence[int], is_over: Callable[[], bool]) -> int:
    """Read these blocks with the engine's reader until the time is over. Returns how many. Raises: TransferError."""
    arena = Arena(NUM_READERS, BLOCK_BYTES)
    sizes = ReadSizes(num_threads=NUM_READERS, part_bytes=BLOCK_BYTES, prefetch_part_bytes=BLOCK_BYTES)
    left, num_read, num_reading = deque(order), 0, 0
    with closing(Reads(SlotTable(max(order) + 1, NUM_READERS, arena.addresses), sizes, owner=(arena, file))) as reads:
        reads.use_file(0, file.native())
        reads.trust()
        free = deque(range(NUM_READERS))
        while True:
            while free and left and not (num_read and is_over()):
                block = left.popleft()
                reads.place(block, PlaceStruct(file=0, offset=block * BLOCK_BYTES, num_bytes=BLOCK_BYTES))
                reads.submit(block, free.popleft())
                num_reading += 1
            if not num_reading:
                return num_read
            reads.wait(reads.num_wakes, MEASURE_S)
            for completion in reads.completions():
                if completion.state != DONE:
                    raise TransferError(f"A block of {BLOCK_BYTES} bytes could not be read from the disk.")
                free.append(completion.slot)
                num_reading -= 1
                num_read += 1


def _judge_speed(name: str, speed: DiskSpeed) -> Check:
    how = "direct" if speed.is_direct else "through the page cache: this file system has no direct reads"
    reads = f"{NUM_READERS} reads of {format_size(BLOCK_BYTES)} in flight"
    found = f"{format_rate(speed.bytes_per_s)}, {how}, {reads}, at random places in {format_size(speed.file_bytes)}"
    problem = warning = ""
    if speed.bytes_per_s < VERY_SLOW_BYTES_PER_S:
        problem = "Missed experts would take seconds per token. Put the store on an SSD: set OFFLOAD_MOE_CACHE."
    elif speed.bytes_per_s < SLOW_BYTES_PER_S:
        warning = "Slower than an NVMe disk. Give more RAM to the experts, or put the store on a faster disk."
    return judge(name, found, problem=problem, warning=warning, numbers={"disk_bytes_per_s": speed.bytes_per_s})
