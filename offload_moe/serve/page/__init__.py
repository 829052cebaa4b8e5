"""The page at `/`: static files of our own, without a framework and without the network.

Scripts and styles come from these files only, and Trusted Types forbid turning a string into HTML or script: an answer
of a model reaches the document as text.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
PAGE_HEADERS = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """One file of the page. etag: quoted, as in the header."""

    body: bytes
    content_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """All files by their path on the server: `/`, `/page/app.js` and so on. None of them needs a key."""
    files = {}
    for entry in sorted(resources.files(__name__).iterdir(), key=lambda entry: entry.name):
        content_type = CONTENT_TYPES.get(entry.name.rpartition(".")[2])
        if content_type is not None:
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            path = "/" if entry.name == "index.html" else f"/page/{entry.name}"
            files[path] = PageFile(body=body, content_type=content_type, etag=etag)
    return MappingProxyType(files)
