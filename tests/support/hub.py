"""A model hub on 127.0.0.1: the endpoints that huggingface_hub uses, with private repositories and broken lines."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GIT_BYTES = 4_000  # larger files are kept outside of git, as the real hub keeps weights


class Hub:
    """One repository at one commit, which `main` names. Changes to the fields take effect at once.

    token: what a private repository wants. cut: file name -> after how many bytes each answer with it breaks off.
    """

    def __init__(self, folder: Path, repo_id: str = "org/tiny") -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.repo_id = repo_id
        self.token: str | None = None
        self.is_gated = False
        self.cut: dict[str, int] = {}
        self.ignores_ranges = False
        self.sent: dict[str, int] = {}  # bytes of content per file
        self.ranges: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def siblings(self) -> list[dict[str, Any]]:
        return [
            {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()} | _lfs(data)
            for name, data in self.files.items()
        ]


def _lfs(data: bytes) -> dict[str, Any]:
    if len(data) < GIT_BYTES:
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


@contextmanager
def hub_in_use(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the files of `folder`, which the hub client of this process asks from now on."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub client waits between attempts
    with running(Hub(folder)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/cdn/"):  # signed addresses: whoever has one may read, and must not send the token
                assert self.headers["Authorization"] is None, "the token left the hub"
                return self._content(path.removeprefix("/cdn/"))
            name = re.match(r"/(?:api/models/)?([^/]+/[^/]+)(?:/|$)", path)
            if name is None or name[1] != hub.repo_id:
                return self._refuse(404, "RepoNotFound")
            if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self._refuse(403, "GatedRepo") if hub.is_gated else self._refuse(401, "RepoNotFound")
            if path.startswith("/api/models/"):
                return self._api(path.removeprefix(f"/api/models/{hub.repo_id}"))
            _, revision, file = path.removeprefix(f"/{hub.repo_id}/").split("/", 2)
            if revision not in (COMMIT, "main"):
                return self._refuse(404, "RevisionNotFound")
            if file not in hub.files:
                return self._refuse(404, "EntryNotFound")
            return self._resolve(file)

        def _api(self, rest: str) -> None:
            revision = re.fullmatch(r"(?:/(?:revision|tree)/([^/]+))?/?", rest)
            if revision is None or revision[1] not in (None, COMMIT, "main"):
                return self._refuse(404, "RevisionNotFound")
            if rest.startswith("/tree"):
                return self._json(
                    [
                        {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]}
                        | ({"lfs": {**s["lfs"], "oid": s["lfs"]["sha256"]}} if "lfs" in s else {})
                        for s in hub.siblings()
                    ]
                )
            return self._json({"id": hub.repo_id, "sha": COMMIT, "siblings": hub.siblings()})

        def _resolve(self, file: str) -> None:
            data = hub.files[file]
            if len(data) < GIT_BYTES:
                return self._content(file)
            headers = {
                "Location": f"http://localhost:{hub.server.server_port}/cdn/{file}",  # another host to a client
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            return self._send(302, b"", headers)

        def _content(self, file: str) -> None:
            data = hub.files[file]
            etag = hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = None if hub.ignores_ranges else re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if wanted is None:
                return self._send(200, data, headers, file)
            start = int(wanted[1])
            end = min(int(wanted[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return self._send(206, data[start:end], headers, file)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str], file: str | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if file is not None:
                hub.ranges.append((file, self.headers["Range"]))
                if file in hub.cut and len(body) > hub.cut[file]:
                    body = body[: hub.cut[file]]
                    self.close_connection = True
                hub.sent[file] = hub.sent.get(file, 0) + len(body)
            self.wfile.write(body)

    return Handler
