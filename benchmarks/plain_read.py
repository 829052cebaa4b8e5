"""The rate of plain reads from memory, which no decoder can exceed.

Usage: python benchmarks/plain_read.py --threads 1 [--megabytes 1024] [--trials 5]

torch's sum over huge pages, as the RAM arena has them. With one thread the time is the thread's own. The last line of
stdout is one JSON document.
"""

import argparse
import time

from harness import bind_to_cores, finish, spread
from live import Answers


class PlainRead:
    """Memory that is read again and again."""

    def __init__(self, num_threads: int, num_bytes: int) -> None:
        import torch

        from offload_moe.memory.arena import Arena

        torch.set_num_threads(num_threads)
        self._clock = time.thread_time if num_threads == 1 else time.perf_counter
        self._arena = Arena(1, num_bytes, chunk_bytes=num_bytes)
        (memory,) = self._arena.chunks_behind(0)
        self._memory = memory.view(torch.int64).fill_(1)
        self.read()  # the first one is slow

    def read(self) -> dict[str, float]:
        began = self._clock()
        self._memory.sum()
        return {"bytes_per_s": self._memory.nbytes / (self._clock() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--live", action="store_true", help="answer requests, see live.py")
    options = parser.parse_args()
    answers = Answers() if options.live else None
    bind_to_cores(options.threads)
    memory = PlainRead(options.threads, options.megabytes << 20)
    if answers is not None:
        answers.serve(memory, {})
    else:
        rates = [memory.read()["bytes_per_s"] for _ in range(options.trials)]
        finish({"benchmark": "plain_read", "threads": options.threads, "bytes_per_s": spread(rates)})


if __name__ == "__main__":
    main()
