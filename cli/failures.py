"""Errors as one line."""

from offload_moe.errors import OffloadMoeError


def one_line(error: Exception) -> str:
    """Our own errors unchanged, the system's with the file, all others with their class and a hint at --debug."""
    if isinstance(error, OffloadMoeError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    kind, first = type(error).__name__, next(iter(str(error).strip().splitlines()), "")
    return f"{kind}: {first}".removesuffix(": ").rstrip(".") + ". Run again with --debug for the traceback."
