"""One module per command, each with `add_parser(subparsers)` and `run(options) -> int`."""

COMMANDS = (
    "chat",
    "run",
    "serve",
    "quantize",
    "plan",
    "simulate",
    "profile",
    "models",
    "list",
    "info",
    "verify",
    "rm",
    "config",
    "doctor",
)
