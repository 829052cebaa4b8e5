"""The page, and the policy that lets a browser run nothing but its own script."""

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from starlette.responses import Response

from offload_moe.serve.errors import ApiError

ELEMENTS = {
    name: re.compile(rf"<{name}[^>]*>(.*?)</{name}>", re.DOTALL | re.IGNORECASE) for name in ("script", "style")
}


def page() -> Response:
    """The page, with its policy. Raises: ApiError where it is not installed."""
    text = _text()
    if text is None:
        raise ApiError(404, "The page is not part of this installation. The API is at /v1.")
    headers = {
        "Content-Security-Policy": policy(text),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
    }
    return Response(text, media_type="text/html", headers=headers)


@lru_cache(maxsize=1)
def _text() -> str | None:
    file = files("offload_moe.serve.page").joinpath("index.html")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def policy(text: str) -> str:
    """The content security policy of a page whose scripts and styles are inline."""
    sources = {name: " ".join(_hashes(name, text)) or "'none'" for name in ELEMENTS}
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sources['script']}",
            f"style-src {sources['style']}",
            "connect-src 'self'",
            "img-src 'self' data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(name: str, text: str) -> list[str]:
    """A browser hashes the text with its line ends normalized, as a file that was read as text has them."""
    digests = (hashlib.sha256(part.encode()).digest() for part in ELEMENTS[name].findall(text))
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
