"""llama.cpp's HTTP server on a GGUF file, until it is ended; the first line of stdout says where it is.

Usage: python benchmarks/peers/serve_llamacpp.py MODEL.gguf --threads 2 --context 2048

With the wheel `xllamacpp`, or with `llama-cpp-python[server]`, whichever this Python has. Imports nothing of ours, so
that an environment with a llama.cpp of its own can run it.
"""

import argparse
import socket
import sys
import threading
from importlib.util import find_spec

HOST = "127.0.0.1"


def serve_wheel(options: argparse.Namespace) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = options.model, free_port()  # of 127.0.0.1, which is its default
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = options.context, 1, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    say(server.listening_address)
    threading.Event().wait()


def serve_native(options: argparse.Namespace) -> None:
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    model = ModelSettings(
        model=options.model,
        n_ctx=options.context,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )
    port = free_port()
    app = create_app(server_settings=ServerSettings(host=HOST, port=port), model_settings=[model])
    listener = socket.create_server((HOST, port))  # a request waits for the application
    say(f"http://{HOST}:{port}")
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def say(address: str) -> None:
    print(address, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    if find_spec("xllamacpp") is not None:
        serve_wheel(options)
    elif find_spec("llama_cpp") is not None:
        serve_native(options)
    else:
        sys.exit("llama.cpp is not here: pip install xllamacpp, or 'llama-cpp-python[server]'")


if __name__ == "__main__":
    main()
