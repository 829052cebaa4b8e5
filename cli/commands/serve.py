"""`offload-moe serve`: the model behind an HTTP API."""

import argparse
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_moe.errors import ConfigError
from offload_moe.system.durations import parse_duration
from offload_moe.system.names import DEMO
from offload_moe.system.paths import user_path
from offload_moe.system.sizes import parse_port
from offload_moe.system.texts import read_text

from ..loading import load_model
from ..options import MEMORY, SAMPLING, Subparsers, add_model_flags, fill, load_arguments
from ..progress import reporter

if TYPE_CHECKING:
    from offload_moe.serve.config import ServeConfig

EXIT_INTERRUPTED = 130
CURL = """curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \
-d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer over HTTP, for the tools that speak OpenAI's or Anthropic's API",
        description="Answer over HTTP: OpenAI's and Anthropic's APIs, a page, and metrics. Needs the extra "
        "offload-moe[serve].",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="store, GGUF file, checkpoint folder or hub id (default: that of `config`, else demo)",
    )
    _add_network_flags(parser)
    _add_cluster_flags(parser)
    _add_engine_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(**dict.fromkeys(SAMPLING))


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    group.add_argument(
        "--port", type=parse_port, metavar="N", help="port to listen on (default: that of `config`, else 8000)"
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a file whose first line is the key that clients need")
    group.add_argument(
        "--cors", metavar="ORIGIN", action="append", default=[], help="pages of this origin may call; repeatable"
    )
    group.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a further name of this server; repeatable"
    )


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several machines")
    group.add_argument(
        "--ray",
        action="store_true",
        help="a replica of the model on each node of the Ray cluster at RAY_ADDRESS, or on this machine alone; needs "
        "the extra offload-moe[ray]",
    )


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="answers at once, in turn (default: 4 while that gives more tokens per second, else 1)",
    )
    group.add_argument("--queue", type=int, metavar="N", default=64, help="requests that may wait (default: 64)")
    group.add_argument(
        "--cache-slots",
        type=int,
        metavar="N",
        default=8,
        help="conversations whose key/value caches are kept, together within the context (default: 8)",
    )
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt whole")
    group.add_argument(
        "--ignore-prefix", metavar="REGEX", help="remove what matches from the beginning of a prompt's first message"
    )
    group.add_argument(
        "--keep-alive",
        type=parse_duration,
        metavar="TIME",
        help="unload the model after so long without a request, such as 10m (default: never)",
    )
    group.add_argument(
        "--drain", type=parse_duration, metavar="TIME", default=60.0, help="time for answers to end (default: 60s)"
    )
    group.add_argument(
        "--strict-model", action="store_true", help="refuse requests that name another model than this one"
    )


def run(options: argparse.Namespace) -> int:
    fill(options, "model", "port")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("The server's libraries are not installed: pip install 'offload-moe[serve]'.") from error
    from offload_moe.serve.config import ServeConfig

    logging.basicConfig(level=logging.INFO if options.debug else logging.WARNING, format="%(levelname)s: %(message)s")
    config = ServeConfig(
        host=options.host,
        port=options.port,
        parallel=options.parallel,
        queue=options.queue,
        cache_slots=0 if options.no_prefix_cache else options.cache_slots,
        keep_alive_s=options.keep_alive,
        api_key=_key(options.api_key_file),
        cors=tuple(options.cors),
        hosts=tuple(options.allow_host),
        is_strict_model=options.strict_model,
        ignore_prefix=options.ignore_prefix,
    )
    return _serve_cluster(options, config) if options.ray else _serve(options, config)


def _serve_cluster(options: argparse.Namespace, config: "ServeConfig") -> int:
    try:
        import httpx2  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'offload-moe[ray]', on every machine.") from error
    from offload_moe.serve.server import listen, url_of

    fill(options, *MEMORY)
    listener = listen(config)
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.cluster.replica import Job
        from offload_moe.cluster.serving import serve_cluster
        from offload_moe.engine.options import LoadOptions
        from offload_moe.serve.app import model_name

    is_folder = options.model != DEMO and user_path(options.model).exists()
    job = Job(
        model=str(user_path(options.model).resolve()) if is_folder else options.model,
        options=LoadOptions().updated(load_arguments(options)),
        config=replace(config, cors=(), hosts=()),
        name=model_name(str(options.model)),
        drain_s=options.drain,
    )
    url = url_of(listener)
    was_interrupted = serve_cluster(job, config, listener, on_ready=lambda: _say(job.name, url, config))
    return EXIT_INTERRUPTED if was_interrupted else 0


def _serve(options: argparse.Namespace, config: "ServeConfig") -> int:
    # uvicorn is light, and an address in use is said before a model is loaded for minutes.
    from offload_moe.serve.server import listen, serve, url_of

    listener = listen(config)
    from offload_moe.serve.app import model_name
    from offload_moe.serve.host import Host

    host = Host(lambda: load_model(options), config, model_name(str(options.model)))
    try:
        host.adopt(load_model(options))
    except BaseException:
        listener.close()
        raise
    url = url_of(listener)
    was_interrupted = serve(host, listener, drain_s=options.drain, on_ready=lambda: _say(host.name, url, config))
    return EXIT_INTERRUPTED if was_interrupted else 0


def _say(name: str, url: str, config: "ServeConfig") -> None:
    if not config.is_local and config.api_key is None:
        print(
            f"warning: {config.host} may be reached from other machines, and there is no key. Give --api-key-file.",
            file=sys.stderr,
        )
    key = "" if config.api_key is None else ' -H "Authorization: Bearer $KEY"'
    print(f"{name} is served at {url} (API: {url}/v1)")
    print(CURL.format(url=url, key=key, name=name), flush=True)


def _key(file: str | None) -> str | None:
    if file is None:
        return None
    return next(iter(read_text(user_path(file)).splitlines()), "").strip()
