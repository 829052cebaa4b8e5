"""Settings of a server. Imports no web framework: the command line reads them."""

import re
from dataclasses import dataclass, field

from offload_moe.errors import ConfigError

DEFAULT_PORT = 8000
SHARED = 4  # requests at once that no choice of the user's limits
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How a server admits and answers.

    parallel: requests answered at once, their steps in turn; None takes `SHARED` while passes that they share give more
    tokens per second, and else one after another. queue: requests that may wait. cache_slots: conversations
    whose key/value caches are kept; 0 computes every prompt whole. keep_alive_s: seconds without a request until the
    model is unloaded; None keeps it. api_key: None needs none. cors: origins of other sites' pages that may call.
    hosts: further names in a Host header; the local ones, `host` and addresses count always. ignore_prefix: a pattern,
    removed from the beginning of the prompt's first message. max_body_bytes: of a request.

    Raises:
        ConfigError: a value is not usable.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    parallel: int | None = None
    queue: int = 64
    cache_slots: int = 8
    keep_alive_s: float | None = None
    api_key: str | None = field(default=None, repr=False)
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    is_strict_model: bool = False
    ignore_prefix: str | None = None
    max_body_bytes: int = 32 << 20
    silence_s: float = 5.0  # until a comment keeps a stream alive
    body_s: float = 30.0  # for a request's body to arrive

    def __post_init__(self) -> None:
        for name, least in (("parallel", 1), ("queue", 0), ("cache_slots", 0), ("max_body_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}. It must be at least {least}.")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("The API key is empty. Write one into the file, or start the server without a key.")
        if self.ignore_prefix is not None:
            try:
                re.compile(self.ignore_prefix)
            except re.error as error:
                raise ConfigError(f"--ignore-prefix is no regular expression: {error}.") from error

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOCAL_HOSTS
