"""Quantize speed against the disk: a bf16 checkpoint to an nf4 store, beside reading its bytes and writing the store's.

    python benchmarks/quantize_speed.py CHECKPOINT --folder SCRATCH [--trials 5] [--codec nf4]

The limit is the time to read the checkpoint plus, where both go to one disk, the time to write as many bytes as the
store has; each alone is reported too. The page cache is dropped before every trial. The last line of stdout is one
JSON document.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from harness import alternate, finish, forget_cached, peak_rss_bytes, spread

CHUNK = 1 << 24


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_all(folder: Path) -> float:
    """Seconds to read every byte once, in large pieces, as fast as one thread can."""
    forget_cached(folder)
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def write_as_many(folder: Path, num_bytes: int) -> float:
    """Seconds to write and sync that many bytes."""
    target = folder / "write-limit"
    piece = os.urandom(CHUNK)
    began = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for at in range(0, num_bytes, CHUNK):
            file.write(piece)
            if at % (CHUNK * 16) == 0:
                os.fdatasync(file.fileno())
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--codec", default="nf4")
    options = parser.parse_args()
    from offload_moe.convert.quantize import quantize

    store = options.folder / "quantize-speed-store"
    shutil.rmtree(store, ignore_errors=True)
    cpu: list[float] = []

    def convert() -> float:
        shutil.rmtree(store, ignore_errors=True)
        forget_cached(options.checkpoint)
        began, began_cpu = time.perf_counter(), time.process_time()
        quantize(options.checkpoint, store, codec=options.codec)
        cpu.append(time.process_time() - began_cpu)
        return time.perf_counter() - began

    convert()
    store_bytes = sum(path.stat().st_size for path in files_of(store))
    checkpoint_bytes = sum(path.stat().st_size for path in files_of(options.checkpoint))
    candidates: dict[str, Callable[[], float]] = {
        "quantize": convert,
        "read": lambda: read_all(options.checkpoint),
        "write": lambda: write_as_many(options.folder, store_bytes),
    }
    seconds = alternate(candidates, num_trials=options.trials, num_warmups=0)
    trials = list(zip(seconds["quantize"], seconds["read"], seconds["write"], strict=True))
    shutil.rmtree(store)
    finish(
        {
            "benchmark": "quantize_speed",
            "codec": options.codec,
            "checkpoint_bytes": checkpoint_bytes,
            "store_bytes": store_bytes,
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "cpu_s": spread(cpu),
            "share_of_the_slower_limit": spread([max(read, write) / own for own, read, write in trials]),
            "share_of_both_one_after_the_other": spread([(read + write) / own for own, read, write in trials]),
            "peak_rss_bytes": peak_rss_bytes(),
        }
    )


if __name__ == "__main__":
    main()
