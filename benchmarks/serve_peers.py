"""The first token behind a kept prefix, beside llama.cpp's own server on a model of the same shape.

    python benchmarks/serve_peers.py --folder FOLDER [--config CONFIG.json] [--threads 2] [--native PYTHON]

The store and the GGUF (Q4_0) have random weights and are written to FOLDER when they are not there yet. Every server is
a process of its own, bound to as many cores as threads, and serves one request at a time. The first request makes it
keep a prefix (its time is reported too); each trial sends the prefix with other tokens behind it to every server in
turn. Milliseconds on the wall, from the request to the first event of the stream. `--native` is a Python with
`llama-cpp-python[server]`, which is built for its processor where the wheel `xllamacpp` is not; without llama.cpp its
columns are missing. The last line of stdout is one JSON document.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from harness import HERE, alternate, bind_to_cores, finish, has_llamacpp, make, paired_ratio, prompt_ids, spread
from serve import ask

OURS, WHEEL, NATIVE = "offload_moe", "llama.cpp", "llama.cpp, native"
CLI = "import sys; from offload_moe_cli.main import main; sys.exit(main(sys.argv[1:]))"
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
END_S = 60


def write_tokenizer(config: Path, store: Path) -> None:
    """A word for each token, for prompts are given as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(json.loads(config.read_text())["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(store)


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """How each server is started, on files of this shape."""
    store, gguf = (options.folder / f"{options.config.stem}{end}" for end in ("-served-store", ".gguf"))
    context = str(options.prompt_tokens + options.new_tokens + 64)
    if not store.exists():
        part = store.with_name(f"{store.name}.new")
        make("synthesize.py", options.config, part)
        write_tokenizer(options.config, part)
        part.rename(store)
    found = {OURS: [sys.executable, "-c", CLI, "serve", str(store), "--port", "0", "--context", context, "--vram", "0"]}
    pythons = {WHEEL: sys.executable} if has_llamacpp() else {}
    pythons |= {NATIVE: str(options.native)} if options.native is not None else {}
    for name, python in pythons.items():
        make("peers/make_random_gguf.py", options.config, gguf)
        peer = [python, str(HERE / "peers/serve_llamacpp.py"), str(gguf)]
        found[name] = [*peer, "--threads", str(options.threads), "--context", context]
    return found


@contextmanager
def started(command: list[str], num_threads: int) -> Iterator[int]:
    """The port of a server in a process of its own."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=partial(bind_to_cores, num_threads)
    )
    try:
        assert process.stdout is not None
        found = next(filter(None, map(ADDRESS.search, process.stdout)), None)
        if found is None:
            raise RuntimeError(f"{' '.join(command)} serves nothing")
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate(timeout=END_S)


def prompt(name: str, options: argparse.Namespace, trial: int) -> list[int] | str:
    """The prefix with tokens of the trial behind it; for llama.cpp as letters, each of which is a token there."""
    ids = [*prompt_ids(0, options.prompt_tokens), *prompt_ids(trial + 1, options.new_tokens)]
    return ids if name == OURS else "".join(chr(ord("C") + token % 23) for token in ids)


def first_token_ms(name: str, port: int, options: argparse.Namespace, trial: int) -> float:
    body = {"prompt": prompt(name, options, trial), "max_tokens": 2}
    return 1e3 * ask(port, body | ({} if name == OURS else {"cache_prompt": True}))["first_s"]


def measure(ports: Mapping[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Every trial of a server has its own new tokens, the same ones for all servers."""
    trials = {name: iter(range(1, options.trials + 2)) for name in ports}
    cold = {name: first_token_ms(name, port, options, 0) for name, port in ports.items()}
    ways = {
        name: lambda name=name, port=port: first_token_ms(name, port, options, next(trials[name]))
        for name, port in ports.items()
    }
    times = alternate(ways, num_trials=options.trials)
    return {
        "first_token_ms": {name: spread(values) for name, values in times.items()},
        "ratios": {f"vs {name}": paired_ratio(times, OURS, name) for name in ports if name != OURS},
        "without_prefix_ms": cold,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--native", type=Path, help="a Python with llama-cpp-python[server]")
    options = parser.parse_args()
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(started(command, options.threads)) for name, command in commands(options).items()
        }
        found = measure(ports, options)
    for name, each in found["first_token_ms"].items():
        print(f"{name}: {each['median']:.0f} ms")
    sizes = {"num_prompt_tokens": options.prompt_tokens, "num_new_tokens": options.new_tokens}
    finish(
        {
            "benchmark": "serve_peers",
            "label": "measured",
            "shape": options.config.stem,
            "threads": options.threads,
            **sizes,
            **found,
        }
    )


if __name__ == "__main__":
    main()
