"""What a token costs through the server beside the step loop alone, and the first token behind a kept prefix.

    python benchmarks/serve.py [MODEL] [--trials 5] [--tokens 64] [--prompt-tokens 1500]

One client in a process of its own reads a stream over a socket; the same prompt goes through the step loop in this
process, in turn with it. Wall-clock milliseconds per token behind the first. The first token's time is that of a second
request whose prompt is kept but for its last token. The last line of stdout is one JSON document.
"""

import argparse
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harness import alternate, finish, paired_ratio, prompt_ids, spread


def ask(port: int, body: Mapping[str, Any]) -> dict[str, float]:
    """Seconds until the first token, and per token behind it, of one stream."""
    body = {"model": "x", "temperature": 0, "stream": True, "ignore_eos": True} | dict(body)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began_at = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    times = [time.perf_counter() for line in response if line.startswith(b"data: {")]
    connection.close()
    return {"first_s": times[0] - began_at, "token_s": (times[-1] - times[0]) / (body["max_tokens"] - 1)}


def ask_from_another_process(port: int, ids: list[int], num_tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--client", str(port), "--tokens", str(num_tokens)]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@contextmanager
def served(model: Any, **settings: Any) -> Iterator[int]:
    """The port of a server in a thread. settings: of its `ServeConfig`."""
    import uvicorn

    from offload_moe.serve import make_app
    from offload_moe.serve.config import ServeConfig

    app = make_app(model, ServeConfig(**settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        app.close()
        listener.close()


def step_loop_s(model: Any, ids: list[int], num_tokens: int) -> float:
    """Seconds per token behind the first, without a server."""
    import torch

    from offload_moe.chat.prompt import stream_tokens

    with stream_tokens(model.hf, None, torch.tensor([ids]), max_new_tokens=num_tokens, temperature=0) as stream:
        times = [time.perf_counter() for _ in stream]
    return (times[-1] - times[0]) / (num_tokens - 1)


def measure(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    size = model.hf.config.get_text_config(decoder=True).vocab_size
    ids = [token % size for token in prompt_ids(0, options.prompt_tokens)]
    first: list[float] = []
    with served(model) as port:
        ask_from_another_process(port, ids, 2)  # which keeps the prefix

        def through_the_server() -> float:
            found = ask_from_another_process(port, ids, options.tokens)
            first.append(found["first_s"] * 1e3)
            return found["token_s"] * 1e3

        ways: dict[str, Callable[[], float]] = {
            "server": through_the_server,
            "step loop": lambda: step_loop_s(model, ids, options.tokens) * 1e3,
        }
        times = alternate(ways, num_trials=options.trials)
    return {
        "ms_per_token": {name: spread(values) for name, values in times.items()},
        "ratio": paired_ratio(times, "server", "step loop"),
        "first_token_ms": spread(first[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        body = {"prompt": json.load(sys.stdin), "max_tokens": options.tokens}
        print(json.dumps(ask(options.client, body)))
        return
    from offload_moe import load

    with load(options.model, context=options.prompt_tokens + options.tokens) as model:
        model.hf.generation_config.eos_token_id = None
        found = measure(model, options)
    for way, each in found["ms_per_token"].items():
        print(f"{way}: {each['median']:.3f} ms per token")
    print(f"first token behind a kept prefix: {found['first_token_ms']['median']:.0f} ms")
    sizes = {"num_tokens": options.tokens, "num_prompt_tokens": options.prompt_tokens}
    finish({"benchmark": "serve", "label": "measured", **sizes, **found})


if __name__ == "__main__":
    main()
