"""Quantize a checkpoint in a process of its own and say what it took.

Usage: python benchmarks/run_quantize.py CHECKPOINT STORE [--codec nf4]

The seconds spent in reading, writing and syncing are counted inside the calls and summed over threads; they overlap
with encoding in other threads. `disk_share` is that sum over wall time.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import finish, io_bytes, peak_rss_bytes


class Stopwatch:
    """Seconds and bytes inside calls, over all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **settings)
            finally:
                spent = time.perf_counter() - began
                with self._lock:
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--codec", default=None)
    options = parser.parse_args()
    import transformers.conversion_mapping  # noqa: F401  imports are not what is measured

    from offload_moe.convert.quantize import quantize
    from offload_moe.store import Store

    watch = Stopwatch()
    os.preadv = watch.wrap("read_s", os.preadv)
    os.pwrite = watch.wrap("write_s", os.pwrite)
    os.fsync = watch.wrap("sync_s", os.fsync)
    imported = peak_rss_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    quantize(options.checkpoint, options.store, codec=options.codec)
    wall_s = time.perf_counter() - began
    store = Store.open(options.store)
    source = sum(path.stat().st_size for path in options.checkpoint.glob("*.safetensors"))
    disk_s = sum(watch.seconds.values())
    document = {
        "codec": store.codec,
        "wall_s": wall_s,
        "cpu_s": time.process_time() - cpu,
        "source_bytes": source,
        "store_bytes": sum(path.stat().st_size for path in options.store.iterdir() if path.is_file()),
        "record_bytes": store.layers[0].record_bytes,
        "num_experts": sum(layer.num_experts for layer in store.layers),
        "source_bytes_per_s": source / wall_s,
        "disk_s": {**watch.seconds, "sum": disk_s},
        "disk_share": disk_s / wall_s,
        "io_bytes": io_bytes(),
        "rss_after_imports_bytes": imported,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    finish(document)


if __name__ == "__main__":
    main()
