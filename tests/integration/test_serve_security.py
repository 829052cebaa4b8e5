"""Who may call: hosts, origins, content types, keys, sizes; what a page of another site can do, and a slow client."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.page import page_files
from tests.support.serving import HELLO, chat, listening, served

BODY = {"model": "x", "messages": HELLO, "max_tokens": 1}
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/props", "/live", "/metrics", "/openapi.json", "/v1/models/tiny")
KEY = "sesame"


@pytest.fixture(scope="module")
def locked(model: Model) -> Iterator[TestClient]:
    with served(model, api_key=KEY) as client:
        yield client


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_host_name_that_is_not_ours_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        response = client.get(path, headers={"Host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "unknown_host")


def test_health_alone_is_given_without_a_host(model: Model) -> None:
    """Checks of load balancers send none, HAProxy's in HTTP/1.0. Every browser sends a Host."""
    with listening(model) as address:
        for path, status in (("/health", b"200"), ("/v1/models", b"403"), ("/", b"403"), ("/healthy", b"403")):
            with socket.create_connection(address, timeout=10) as check:
                check.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                assert check.recv(1000).split()[1] == status, path


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000", "192.168.1.7:8000"])
def test_addresses_and_local_names_are_ours(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_names_may_be_added(model: Model) -> None:
    with served(model, hosts=("Big-Box.lan",)) as client:
        assert client.get("/health", headers={"Host": "big-box.lan:8000"}).status_code == 200


def test_pages_of_other_sites_may_not_call(client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:3000", "http://localhost.evil"):
        response = client.post("/v1/chat/completions", json=BODY, headers={"Origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "unknown_origin")
        assert "access-control-allow-origin" not in response.headers
    own = client.post("/v1/chat/completions", json=BODY, headers={"Origin": "http://localhost"})
    assert own.status_code == 200


def test_origins_may_be_allowed(model: Model) -> None:
    with served(model, cors=("https://chat.example",)) as client:
        headers = {"Origin": "https://chat.example", "Access-Control-Request-Headers": "authorization, x-other"}
        asked = client.options("/v1/chat/completions", headers=headers)
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "https://chat.example"
        assert asked.headers["access-control-allow-headers"] == "authorization, x-other"
        answer = client.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert client.options("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_cannot_post(client: TestClient, kind: str) -> None:
    response = client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": kind})
    assert response.status_code == 415


def test_which_routes_need_the_key(locked: TestClient) -> None:
    assert locked.get("/health").status_code == 200
    assert locked.get("/favicon.ico").status_code == 204
    assert locked.get("/").status_code != 401
    for path in GETS:
        assert locked.get(path).status_code == 401, path
    for path in (*POSTS, "/v1/messages/count_tokens", "/v1/nothing"):
        response = locked.post(path, json=BODY)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "Basic sesame", "sesame"])
def test_wrong_keys(locked: TestClient, given: str) -> None:
    response = locked.get("/v1/models", headers={"Authorization": given})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert KEY not in response.text


def test_right_keys(locked: TestClient) -> None:
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
        assert locked.get("/v1/models", headers=headers).status_code == 200


def test_an_error_has_the_form_of_its_api(locked: TestClient) -> None:
    assert locked.post("/v1/messages", json=BODY).json() == {
        "type": "error",
        "error": {
            "type": "authentication_error",
            "message": "This server needs its API key: Authorization: Bearer KEY, or x-api-key: KEY.",
        },
    }


def test_sizes_and_depths_are_limited(model: Model) -> None:
    with served(model, max_body_bytes=1000) as client:
        big = client.post("/v1/chat/completions", json=BODY | {"x": "y" * 2000})
        assert (big.status_code, big.json()["error"]["code"]) == (413, "request_too_large")

        def parts() -> Iterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        chunked = client.post("/v1/chat/completions", content=parts(), headers={"Content-Type": "application/json"})
        assert chunked.status_code == 413
        assert chat(client)["object"] == "chat.completion"
    with served(model) as client:
        deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/chat/completions", content=deep, headers=headers).status_code == 400
        for body in (b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"null"):
            response = client.post("/v1/chat/completions", content=body, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json"), body


def test_a_body_that_does_not_arrive_holds_nothing(model: Model) -> None:
    with listening(model, body_s=0.3) as address, socket.create_connection(address) as slow:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b"Content-Length: 500\r\n\r\n{")
        began_at = time.monotonic()
        slow.settimeout(10)
        assert b" 408 " in slow.recv(1000)
        assert time.monotonic() - began_at < 5


def test_lone_surrogates_and_other_oddities(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"model":"x","max_tokens":1,"messages":[{"role":"user","content":"a\\ud800b"}]}'
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert client.post("/tokenize", content=b'{"content":"\\ud800"}', headers=headers).status_code == 400


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": 0},
        {"queue": -1},
        {"cache_slots": -1},
        {"api_key": " "},
        {"ignore_prefix": "("},
        {"max_body_bytes": 0},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(**settings)


def test_the_key_is_in_no_text() -> None:
    assert KEY not in repr(ServeConfig(api_key=KEY))


def test_the_pages_files_need_no_key(locked: TestClient) -> None:
    for path, file in page_files().items():
        answer = locked.get(path)
        assert (answer.status_code, answer.content) == (200, file.body)
        assert answer.headers["content-type"] == file.content_type
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert locked.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert locked.get("/page/__init__.py").status_code in (401, 404)
    assert locked.get("/page/../security.py").status_code in (401, 404)
