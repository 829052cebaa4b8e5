"""Several conversations that share passes, beside the same ones one after another; and many clients of a server.

    python benchmarks/batching.py [STORE] [--threads 2] [--trials 5] [--conversations 4] [--tokens 64] [--resident 0.25]
           [--native PYTHON --gguf FILE [--peer-options="--huge-pages"]]

Answers are drawn with a seed each, at a temperature that spreads the choice of experts; their prompts, of different
lengths, are computed while the clock stands. `together`: a token of each in turn, in passes of as many rows as pay, and
the first of them alone, and no further one begun, while none pay: as the server and `generate_many` do.
`one after another`: first come, first served. The tokens are the same both ways, which is checked. Trials alternate.

four_conversations_ratio           tokens per second together over one after another, every expert resident
four_conversations_share_of_bound  that over the gain which the bytes read allow: dense weights once per pass, and each
                                   expert that one of its rows chose
four_conversations_disk_ratio      the ratio with so many of the experts in RAM (`--resident`), the rest read from disk

`--native` with a GGUF file of the same shape (`decode_cpu.py` makes one): llama.cpp built for this processor computes
the same prompts in as many slots, in the same trials; `four_conversations_vs_llamacpp` is our rate together over its.

The clients (`--clients`, 0 for none) are threads of another process, which stream answers of mixed lengths through the
server, as many at once as its default; the others wait. `p95_ms`: of the time between two tokens, of all clients, and
of the first four (`1`), whose lengths are as mixed, one after another, so that each is alone. The chunks of other
prompts come between, of which `chunk_ms` is one; `p95_over_goal`: over twice that of one client and a chunk. A store
without a tokenizer streams no text, and has none of these figures. The last line of stdout is one JSON document.
"""

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

from harness import HOT_SAMPLING, alternate, bind_to_cores, finish, paired_ratio, prompt_ids, spread
from live import Live
from llamacpp_builds import NATIVE, RUNNER, describe_builds
from run_store import fill
from serve import served
from speculation import Bound, Figures

TOGETHER, APART = "together", "one after another"
MIXED = 4  # clients whose prompts are of different lengths
CHUNK = 512  # tokens of a prompt that are computed at once


class Conversations:
    """Answers of one loaded model."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model, self._options = model, options
        self._size = model.hf.config.get_text_config(decoder=True).vocab_size
        self._expected: dict[int, list[int]] = {}
        self.last: dict[str, Figures] = {}

    def apart(self) -> float:
        return self._measured(APART, [[number] for number in range(self._options.conversations)])

    def together(self) -> float:
        return self._measured(TOGETHER, [range(self._options.conversations)])

    def _measured(self, way: str, groups: Sequence[Sequence[int]]) -> float:
        """Tokens per second of groups of conversations, behind the first token of each."""
        from offload_moe.chat.sharing import sharing_of
        from offload_moe.residency.counters import Counters

        sharing = sharing_of(self.model.hf)
        elapsed_s, seen, num_tokens = 0.0, Counters(), 0
        for group in groups:
            waiting, running = list(group), dict[int, Any]()
            while waiting or running:
                while waiting and (not running or sharing.pays(self.model.hf)):
                    number = waiting.pop(0)
                    running[number] = self._begun(number)
                before, began_s = self.model.stats.copy(), time.perf_counter()
                turn = list(running) if sharing.pays(self.model.hf) else list(running)[:1]
                ended = [number for number in turn if next(running[number], None) is None]
                elapsed_s += time.perf_counter() - began_s
                seen = seen.plus(self.model.stats.since(before))
                for number in ended:
                    tokens = running.pop(number).tokens
                    num_tokens += len(tokens) - 1
                    assert tokens == self._expected.setdefault(number, tokens), "an answer has changed"
        figures = Figures(num_tokens / elapsed_s, seen.num_passes, seen.num_accesses / seen.num_acquires)
        self.last[way] = figures
        return figures.rate

    def prompt(self, number: int) -> list[int]:
        length = self._options.prompt_tokens * (number + 1) // self._options.conversations
        return [token % self._size for token in prompt_ids(number, max(1, length))]

    def _begun(self, number: int) -> Any:
        """A stream behind its first token."""
        import torch

        from offload_moe.chat.prompt import stream_tokens

        ids = self.prompt(number)
        sampling = HOT_SAMPLING | {"seed": number, "max_new_tokens": self._options.tokens, "speculate": "off"}
        stream = stream_tokens(self.model.hf, None, torch.tensor([ids]), **sampling)
        next(stream)
        return stream


def compared(model: Any, options: argparse.Namespace, *, has_peer: bool) -> dict[str, Any]:
    conversations = Conversations(model, options)
    ways: dict[str, Callable[[], float]] = {APART: conversations.apart, TOGETHER: conversations.together}
    with ExitStack() as stack:
        if has_peer and options.native:
            ways[NATIVE] = slots_of(stack.enter_context(Live(peer_command(options))), conversations, options)
        rates = alternate(ways, num_trials=options.trials)
    last, ratio = conversations.last, paired_ratio(rates, TOGETHER, APART)
    bound = Bound(model).gain(last[APART], last[TOGETHER])
    return {
        "tokens_per_s": {way: spread(values) for way, values in rates.items()},
        "ratio": ratio,
        "rows_per_pass": last[APART].num_passes / last[TOGETHER].num_passes,
        "experts_per_pass": {way: figures.experts_per_pass for way, figures in last.items()},
        "byte_bound": bound,
        "share_of_bound": {name: value / bound for name, value in ratio.items()},
    } | ({"vs_llamacpp": paired_ratio(rates, TOGETHER, NATIVE)} if NATIVE in rates else {})


def peer_command(options: argparse.Namespace) -> list[str]:
    command = [options.native, RUNNER, options.gguf, "--threads", str(options.threads)]
    command += ["--slots", str(options.conversations), "--context", str(options.prompt_tokens + options.tokens)]
    return [*command, *options.peer_options.split()]


def slots_of(peer: Live, conversations: Conversations, options: argparse.Namespace) -> Callable[[], float]:
    """Tokens per second of the same prompts in slots of llama.cpp."""
    prompts = [conversations.prompt(number) for number in range(options.conversations)]
    return lambda: float(peer.ask("slots", prompts=prompts, num_tokens=options.tokens)["decode_tokens_per_s"])


@contextmanager
def loaded(options: argparse.Namespace, share: float | None) -> Iterator[Any]:
    """share: of the experts that have a slot; None for all."""
    from offload_moe import load

    # The plan is for one conversation, and all of them are to have room beside the slots.
    longest = max(options.prompt_tokens, options.client_prompt_tokens if options.clients else 0)
    context, ram = options.conversations * (longest + options.tokens), None
    if share is not None:
        with load(options.store, context=context) as model:
            ram = model.placement.ram.bytes_with(max(1, int(share * model.engine.hierarchy.pools.keys.total)))
    with load(options.store, ram=ram, context=context) as model:
        model.hf.generation_config.eos_token_id = None
        if share is None:
            fill(model)
        yield model


def gaps_ms(port: int, client: int, options: argparse.Namespace) -> list[float]:
    """Milliseconds between the events of one stream, of which nearly each is a token."""
    length = 1 + options.client_prompt_tokens * (client % MIXED) // MIXED
    ids = [token % options.vocabulary for token in prompt_ids(client, length)]
    body = {"model": "x", "prompt": ids, "max_tokens": options.tokens * (2 + client % 3) // 4, "seed": client}
    body |= {
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 2.0,
        "top_k": 0,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    lines = [(time.perf_counter(), line) for line in connection.getresponse() if line.startswith(b"data: {")]
    connection.close()
    times = [at for at, line in lines if has_text(json.loads(line.removeprefix(b"data: ")))]
    return [1e3 * (after - before) for before, after in pairwise(times)]


def has_text(event: dict[str, Any]) -> bool:
    """Not so those of the end and of the usage, which come at once behind the last token."""
    return any(choice["text"] for choice in event["choices"])


def ask_many(port: int, num_clients: int, at_once: int, options: argparse.Namespace) -> list[float]:
    """From another process. at_once: how many of them."""
    command = [sys.executable, __file__, "--port", str(port), "--clients", str(num_clients), "--at-once", str(at_once)]
    command += ["--tokens", str(options.tokens), "--client-prompt-tokens", str(options.client_prompt_tokens)]
    command += ["--vocabulary", str(options.vocabulary)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout))


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def chunk_s(model: Any, options: argparse.Namespace) -> float:
    """Seconds of a chunk of a prompt, or of the longest prompt, where that is shorter."""
    import torch

    from offload_moe.chat.prompt import stream_tokens

    ids = [token % options.vocabulary for token in prompt_ids(0, min(options.client_prompt_tokens, CHUNK))]
    with stream_tokens(model.hf, None, torch.tensor([ids]), max_new_tokens=1, temperature=0) as stream:
        next(stream)
        return float(stream.prompt_s)


def clients(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Between two tokens, at the 95th percentile."""
    options.vocabulary = min(20_300, model.hf.config.get_text_config(decoder=True).vocab_size)
    with served(model, queue=options.clients) as port:
        ways = {
            "1": lambda: p95(ask_many(port, min(MIXED, options.clients), 1, options)),
            str(options.clients): lambda: p95(ask_many(port, options.clients, options.clients, options)),
        }
        found = alternate(ways, num_trials=options.trials)
    chunk_ms = spread([1e3 * chunk_s(model, options) for _ in range(options.trials)])
    many, alone = found[str(options.clients)], found["1"]
    goals_ms = [2 * each + chunk_ms["median"] for each in alone]
    return {
        "p95_ms": {number: spread(values) for number, values in found.items()},
        "ratio": paired_ratio(found, str(options.clients), "1"),
        "chunk_ms": chunk_ms,
        "p95_over_goal": spread([each / goal_ms for each, goal_ms in zip(many, goals_ms, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest prompt")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--client-prompt-tokens", type=int, default=800, help="of the longest prompt of a client")
    parser.add_argument("--native", metavar="PYTHON", help="that has llama.cpp built for this processor")
    parser.add_argument("--gguf", metavar="FILE", help="for it")
    parser.add_argument("--peer-options", default="--flash-attention off --huge-pages", help="of run_llamacpp.py")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts in RAM")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port is not None:
        with ThreadPoolExecutor(options.at_once) as pool:
            found = pool.map(lambda client: gaps_ms(options.port, client, options), range(options.clients))
            print(json.dumps([gap for gaps in found for gap in gaps]))
        return
    bind_to_cores(options.threads)
    import torch

    from offload_moe.native import kernels

    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    peers = describe_builds({NATIVE: options.native}) if options.native else {}
    document: dict[str, Any] = {}
    for name, share in (("resident", None), ("disk", options.resident)):
        with loaded(options, share) as model:
            document[name] = found = compared(model, options, has_peer=share is None)
            ratio, bound = found["ratio"], found["byte_bound"]
            print(
                f"{name}: {ratio['median']:.2f} times one after another ({ratio['min']:.2f} to {ratio['max']:.2f}), "
                f"{found['rows_per_pass']:.2f} rows a pass, byte bound {bound:.2f}"
            )
            if share is None and options.clients and model.tokenizer is not None:  # else no text, so no event, comes
                document["clients"] = clients(model, options)
    finish(
        {
            "benchmark": "batching",
            "label": "measured",
            "store": options.store,
            "threads": options.threads,
            "peers": peers,
            "num_conversations": options.conversations,
            "num_tokens": options.tokens,
            "num_prompt_tokens": options.prompt_tokens,
            "resident_share": options.resident,
            "four_conversations_ratio": document["resident"]["ratio"],
            "four_conversations_share_of_bound": document["resident"]["share_of_bound"],
            "four_conversations_disk_ratio": document["disk"]["ratio"],
            **({"four_conversations_vs_llamacpp": document["resident"]["vs_llamacpp"]} if peers else {}),
            **document,
        }
    )


if __name__ == "__main__":
    main()
