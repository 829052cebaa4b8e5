"""The model behind the HTTP APIs that people's tools speak: OpenAI's and Anthropic's, with a page to look at."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_moe.serve.app import make_app

__all__ = ["make_app"]


def __getattr__(name: str) -> Any:
    """Import the web framework at the first use: the command line reads this package's settings without it."""
    if name == "make_app":
        from offload_moe.serve.app import make_app

        return make_app
    raise AttributeError(f"module 'offload_moe.serve' has no attribute {name!r}")
