"""Errors as one line."""

from offload_moe.errors import OffloadMoeError


def one_line(error: Exception) -> str:
    """Ours as they are, the system's with the file they are about, any other with its kind and where to read more."""
    if isinstance(error, OffloadMoeError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind, first = type(error).__name__, next(iter(str(error).strip().splitlines()), "")
    return f"{kind}: {first}".removesuffix(": ").rstrip(".") + ". Run again with --debug for the traceback."
