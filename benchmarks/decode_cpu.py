"""Decode and prompt speed on the CPU, everything in memory, against llama.cpp's 4-bit weights on the same shape.

Usage: python benchmarks/decode_cpu.py --config benchmarks/configs/OLMoE-1B-7B-0125.json --folder SCRATCH
       [--native PYTHON] [--wheel PYTHON] [--threads 2] [--trials 5] [--prompt-tokens 64 512] [--context 2000 8000]
       [--tokens 32] [--layers N] [--codec mxfp4 | --same-file Q4_K_M] [--peer-options="--keys q8_0"] [--reload]
       [--transformers]

`--native`: the Python of an environment with llama.cpp built for this processor (docs/benchmarks.md), which is
checked for the processor's instructions; `llama.cpp native` in the result. `--wheel`: one with the wheel `xllamacpp`,
`llama.cpp wheel`; without either option, this Python's, where it has one. Files are made in SCRATCH with random weights
when they are not there yet. `--same-file`: offload_moe is given the peer's GGUF file, of that mixture of types, and
computes with its blocks as they lie.

Every process loads once and is bound to as many cores as threads; in a trial, they compute in turn. For each of
`--prompt-tokens`, a trial is a prompt and so many tokens; the first run is not counted. For each of `--context`, the
prompt is computed once, on every core, and a trial is so many tokens more. `--reload`: where the models do not fit in
memory together, a trial loads them one at a time, and its second run counts. Ratios are taken trial by trial.

`share_of_byte_bound`: the bytes that a token must read (experts, dense weights, keys and values in 16 bits), at the
rate of a plain read in the same trial, over the time it took; with one thread both times are CPU time.
`outside_of_native_calls`: of our time per token, by a run of token_profile.py on the same threads.

`--transformers` adds transformers in bf16 and with bitsandbytes' 4-bit linears on a checkpoint of the same shape;
`--layers` makes every model that much shorter. The last line of stdout is one JSON document. On a machine that is busy
with other work, wall-clock rates of spinning thread pools mean little; CPU milliseconds per token with `--threads 1`
still do.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import token_bytes
from harness import HERE, finish, make, paired_ratio, run_json, spread
from live import Answer, Live
from llamacpp_builds import RUNNER, add_options, chosen_pythons, describe_builds
from peers.gguf_mixture import MIXTURES

OURS, READ = "offload_moe", "plain read"
WARM_UP_TOKENS = 4
SEED = 1
SPARE_TOKENS = 64
LONG = 1 << 15  # positions of a shape whose own are too few


def main() -> None:
    options = parse_options()
    files = Files(options)
    if options.peer_options is None:
        options.peer_options = best_settings(files.shape)
    pythons = chosen_pythons(options)
    builds = describe_builds(pythons)
    files.make(has_peers=bool(pythons))
    with Bench(options, files, engine_commands(options, files, pythons)) as bench:
        measured = [bench.measure(length, is_deep=False) for length in options.prompt_tokens]
        measured += [bench.measure(length, is_deep=True) for length in options.context]
    sizes = files.token_bytes(list(builds))
    results = [each.report(options.threads, with_cache(sizes, files, each)) for each in measured]
    for each in results:
        print_summary(each)
    finish(
        {
            "benchmark": "decode_cpu",
            "shape": options.config.stem,
            "layers": options.layers,
            "same_file": options.same_file,
            "threads": options.threads,
            "trials": options.trials,
            "tokens": options.tokens,
            "peers": builds,
            "peer_options": options.peer_options,
            "bytes_per_token": sizes,
            "outside_of_native_calls": outside_of_native_calls(options, files.store),
            "results": results,
            OURS: bench.our_figures,
        }
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    add_options(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[64])
    parser.add_argument("--context", type=int, nargs="*", default=[])
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--codec", default="nf4", help="of our experts")
    parser.add_argument(
        "--same-file", choices=MIXTURES, metavar="MIXTURE", help="both run one GGUF file of these types"
    )
    parser.add_argument("--peer-options", help="of run_llamacpp.py, as tune_llamacpp.py finds them")
    parser.add_argument("--reload", action="store_true")
    return parser.parse_args()


def room(options: argparse.Namespace) -> int:
    """Tokens of the longest sequence."""
    shallow = [length + options.tokens for length in options.prompt_tokens]
    deep = [length + WARM_UP_TOKENS + options.trials * options.tokens for length in options.context]
    return max(shallow + deep) + SPARE_TOKENS


class Files:
    """Store, GGUF file and checkpoint of a shape, in the scratch folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        config = json.loads(options.config.read_text())
        name = options.config.stem
        if options.layers is not None:
            name += f"-{options.layers}"
            config["num_hidden_layers"] = options.layers
            if "layer_types" in config:
                config["layer_types"] = config["layer_types"][: options.layers]
        mixture = "" if options.same_file is None else f"-{options.same_file}"
        self.gguf, self.checkpoint = (options.folder / f"{name}{end}" for end in (f"{mixture}.gguf", "-bf16"))
        if config["max_position_embeddings"] < room(options):
            name += "-long"
            config["max_position_embeddings"] = LONG
        self.shape, self.config = config, options.folder / f"{name}.json"
        self.store = options.folder / f"{name}{'' if options.codec == 'nf4' else f'-{options.codec}'}-store"
        if options.same_file is not None:
            self.store = self.gguf

    def make(self, *, has_peers: bool) -> None:
        self._options.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(json.dumps(self.shape, indent=1))
        if self._options.same_file is not None:
            make("peers/make_random_gguf.py", self.config, self.gguf, "--mixture", self._options.same_file)
        else:
            make("synthesize.py", self.config, self.store, "--codec", self._options.codec)
        if has_peers:
            make("peers/make_random_gguf.py", self.config, self.gguf)
        if self._options.transformers:
            make("peers/make_random_checkpoint.py", self.config, self.checkpoint)

    def token_bytes(self, peers: list[str]) -> dict[str, dict[str, float]]:
        is_same = self.store == self.gguf
        of_file = token_bytes.of_gguf(self.gguf, self.shape) if peers or is_same else {}
        return {OURS: of_file if is_same else token_bytes.of_store(self.store)} | dict.fromkeys(peers, of_file)


def best_settings(config: dict[str, Any]) -> str:
    """Of llama.cpp on a CPU, see docs/benchmarks.md: its flash attention pays for latents and for attention sinks."""
    pays = bool(config.get("kv_lora_rank")) or config["model_type"] == "gpt_oss"
    return f"--flash-attention {'on' if pays else 'off'} --huge-pages"


def engine_commands(options: argparse.Namespace, files: Files, pythons: dict[str, str]) -> dict[str, list[str]]:
    """Of the processes that answer requests."""
    shared = ["--threads", str(options.threads), "--context", str(room(options))]
    commands = {OURS: [sys.executable, str(HERE / "run_store.py"), str(files.store), *shared]}
    runner = [RUNNER, str(files.gguf), *shared, *options.peer_options.split()]
    return commands | {name: [python, *runner] for name, python in pythons.items()}


@dataclass(slots=True)
class Measured:
    """Trials after so many tokens; is_deep: whose prompt was computed once, on every core."""

    length: int
    is_deep: bool
    trials: list[dict[str, Answer]]

    def figures(self, name: str) -> dict[str, list[float]]:
        """Engine -> that figure of every trial, where it has it."""
        engines = [engine for engine in self.trials[0] if name in self.trials[0][engine]]
        return {engine: [trial[engine][name] for trial in self.trials] for engine in engines}

    def report(self, threads: int, sizes: dict[str, float]) -> dict[str, Any]:
        decodes, prompts = self.figures("decode_tokens_per_s"), self.figures("prompt_tokens_per_s")
        cpu, prompt_cpu = self.figures("decode_cpu_ms"), self.figures("prompt_cpu_ms")
        peers = [name for name in decodes if name != OURS]
        return {
            "context": self.length,
            "is_deep": self.is_deep,
            "decode_tokens_per_s": {name: spread(values) for name, values in decodes.items()},
            "decode_ratios": {f"vs {name}": paired_ratio(decodes, OURS, name) for name in peers},
            "decode_cpu_ms": {name: spread(values) for name, values in cpu.items()},
            "decode_cpu_ratios": {f"{name} over ours": paired_ratio(cpu, name, OURS) for name in peers if name in cpu},
            "prompt_tokens_per_s": {name: spread(values) for name, values in prompts.items()},
            "prompt_ratios": {f"vs {name}": paired_ratio(prompts, OURS, name) for name in peers if name in prompts},
            "prompt_cpu_ms": {name: spread(values) for name, values in prompt_cpu.items()},
            "prompt_cpu_ratios": {
                f"{name} over ours": paired_ratio(prompt_cpu, name, OURS) for name in peers if name in prompt_cpu
            },
            "read_bytes_per_s": spread(self.figures("bytes_per_s")[READ]),
            "bytes_per_token": sizes,
            "share_of_byte_bound": {name: self._share(num_bytes, name, threads) for name, num_bytes in sizes.items()},
        }

    def _share(self, num_bytes: float, name: str, threads: int) -> dict[str, float]:
        def seconds(answer: Answer) -> float:
            return answer["decode_cpu_ms"] / 1e3 if threads == 1 else 1 / answer["decode_tokens_per_s"]

        return spread([num_bytes / trial[READ]["bytes_per_s"] / seconds(trial[name]) for trial in self.trials])


def with_cache(sizes: dict[str, dict[str, float]], files: Files, measured: Measured) -> dict[str, float]:
    """Engine -> bytes that a token reads at that depth."""
    cache = token_bytes.of_cache(files.config, measured.length)
    return {name: size["experts"] + size["dense"] + cache for name, size in sizes.items()}


def print_summary(result: dict[str, Any]) -> None:
    for name in ("decode_cpu_ratios", "decode_ratios", "prompt_cpu_ratios", "prompt_ratios", "share_of_byte_bound"):
        for what, values in result[name].items():
            median, least, most = (values[each] for each in ("median", "min", "max"))
            line = f"after {result['context']} tokens  {name:20} {what:30} {median:.3f} ({least:.3f} to {most:.3f})"
            print(line, file=sys.stderr)


class Bench:
    """The engines, which stay loaded, or with `--reload` are loaded for each trial."""

    def __init__(self, options: argparse.Namespace, files: Files, commands: dict[str, list[str]]) -> None:
        self._options, self._commands = options, commands
        self._once = transformers_commands(options, files)
        self._live: dict[str, Live] = {}
        self._stack = ExitStack()
        self.our_figures: dict[str, float] = {}

    def __enter__(self) -> Self:
        reader = [sys.executable, str(HERE / "plain_read.py"), "--threads", str(self._options.threads)]
        self._reader = self._stack.enter_context(Live(reader))
        if not self._options.reload:
            for name, command in self._commands.items():
                self._live[name] = self._stack.enter_context(Live(command))
            self._note(self._live[OURS])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, ours: Live) -> None:
        self.our_figures = ours.loaded | ours.ask("distinct", num_tokens=self._options.tokens)

    def measure(self, length: int, *, is_deep: bool) -> Measured:
        for process in self._live.values():
            if is_deep:
                descend(process, length)
            else:
                self._run(process, length, is_deep)
        return Measured(length, is_deep, [self._trial(length, is_deep) for _ in range(self._options.trials)])

    def _trial(self, length: int, is_deep: bool) -> dict[str, Answer]:
        trial = {READ: self._reader.ask("read")}
        for name in self._commands:
            trial[name] = (
                self._run(self._live[name], length, is_deep) if self._live else self._run_anew(name, length, is_deep)
            )
        for name, command in self._once.items() if not is_deep else ():
            trial[name] = run_json([*command, "--prompt-tokens", str(length)])["runs"][-1]
        for name, answer in trial.items():
            print(length, name, answer, file=sys.stderr, flush=True)
        return trial

    def _run(self, process: Live, length: int, is_deep: bool) -> Answer:
        prompted = {} if is_deep else process.ask("prompt", num_tokens=length, seed=SEED)
        return prompted | process.ask("decode", num_tokens=self._options.tokens)

    def _run_anew(self, name: str, length: int, is_deep: bool) -> Answer:
        with Live(self._commands[name]) as process:
            if is_deep:
                descend(process, length)
            else:
                self._run(process, length, is_deep)
            answer = self._run(process, length, is_deep)
            if name == OURS:
                self._note(process)
        return answer


def descend(process: Live, length: int) -> None:
    process.ask("prompt", num_tokens=length, seed=SEED, all_cores=True)
    process.ask("decode", num_tokens=WARM_UP_TOKENS)


def transformers_commands(options: argparse.Namespace, files: Files) -> dict[str, list[str]]:
    """Of processes that run once."""
    if not options.transformers:
        return {}
    command = [sys.executable, str(HERE / "peers/run_transformers.py"), str(files.checkpoint)]
    command += ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    return {"transformers bf16": command, "transformers bitsandbytes": [*command, "--bitsandbytes"]}


def outside_of_native_calls(options: argparse.Namespace, store: Path) -> dict[str, float]:
    command = [sys.executable, str(HERE / "token_profile.py"), str(store), "--threads", str(options.threads)]
    profile = run_json([*command, "--tokens", str(options.tokens)])
    return {"of_forward": profile["share_outside_of_native_calls"], "of_token": profile["share_of_token_outside"]}


if __name__ == "__main__":
    main()
