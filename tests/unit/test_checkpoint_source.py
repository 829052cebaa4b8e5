"""Folders and hub ids: what is fetched, what is kept, and how a failed download is told."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from offload_moe.checkpoint.source import looks_like_hub_id, metadata_files, resolve_source
from offload_moe.errors import TransferError


def test_a_folder_is_itself(tmp_path: Path) -> None:
    source = resolve_source(tmp_path)
    assert (source.folder, source.name, source.revision) == (tmp_path, tmp_path.name, None)


@pytest.mark.parametrize("text", ["mistralai/Mixtral-8x7B-v0.1", "a/b", "openai/gpt-oss-20b"])
def test_hub_ids(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.mark.parametrize("text", ["/a/b", "a/b/c", "demo", "../a", "a/..", "./a", "a b/c", "", "~/models", "a//b"])
def test_no_hub_ids(text: str) -> None:
    assert not looks_like_hub_id(text)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the hub client was asked for; it answers with a snapshot of commit c0ffee."""
    recorded: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **settings: Any) -> str:
        recorded.update(settings, repo_id=repo_id)
        return str(tmp_path / "snapshots" / "c0ffee")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return recorded


def test_a_hub_id_is_downloaded_at_its_revision(asked: dict[str, Any], tmp_path: Path) -> None:
    source = resolve_source("org/model", revision="main", token="secret")
    assert (source.folder, source.name, source.revision) == (tmp_path / "snapshots" / "c0ffee", "org/model", "c0ffee")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("org/model", "main", "secret")


@pytest.mark.parametrize(
    ("name", "is_fetched"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("merges.txt", True),
        ("pytorch_model.bin", False),
        ("consolidated.00.pth", False),
        ("consolidated.safetensors", False),
        ("original/model-00001.safetensors", False),
        ("metal/model.bin", False),
        ("original/config.json", False),
        ("modeling_x.py", False),
        ("README.md", False),
    ],
)
def test_only_needed_files_are_fetched(asked: dict[str, Any], name: str, is_fetched: bool) -> None:
    resolve_source("org/model")
    allowed = any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    ignored = any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"])
    assert (allowed and not ignored) == is_fetched


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/api"))


@pytest.mark.parametrize(
    ("make_error", "match"),
    [
        (lambda: GatedRepoError("no", response=response(403)), "is gated"),
        (lambda: RepositoryNotFoundError("no", response=response(404)), "not on the hub, or is private"),
        (lambda: RevisionNotFoundError("no", response=response(404)), "no revision 'v9'"),
        (
            lambda: HfHubHTTPError("500 Server\nError", response=response(500)),
            "Downloading org/model failed: 500 Server",
        ),
        (lambda: LocalEntryNotFoundError("offline"), "Downloading org/model failed: offline"),
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_failed_download_is_named(
    monkeypatch: pytest.MonkeyPatch, make_error: Callable[[], Exception], match: str
) -> None:
    def fail(repo_id: str, **settings: Any) -> str:
        raise make_error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TransferError, match=match) as caught:
        resolve_source("org/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_metadata_files(tmp_path: Path) -> None:
    kept = ["chat_template.jinja", "config.json", "tokenizer.json"]
    for name in [*kept, "model.safetensors.index.json", "store.json", "weights.safetensors", "evil.py", "LICENSE.txt"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("")
    assert list(metadata_files(tmp_path)) == ["additional_chat_templates/tools.jinja", *kept]
