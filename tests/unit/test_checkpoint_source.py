"""Folders and hub ids: what is fetched, what is kept, and how a failed download is told."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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
from huggingface_hub.utils import filter_repo_objects

from offload_moe.checkpoint.source import looks_like_hub_id, metadata_files, resolve_source
from offload_moe.errors import CheckpointError, TransferError


def test_a_folder_is_itself(tmp_path: Path) -> None:
    source = resolve_source(tmp_path)
    assert (source.folder, source.name, source.revision) == (tmp_path, tmp_path.name, None)


@pytest.mark.parametrize("text", ["mistralai/Mixtral-8x7B-v0.1", "a/b", "openai/gpt-oss-20b"])
def test_hub_ids(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.mark.parametrize("text", ["/a/b", "a/b/c", "demo", "../a", "a/..", "./a", "a b/c", "", "~/models", "a//b"])
def test_no_hub_ids(text: str) -> None:
    assert not looks_like_hub_id(text)


INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@dataclass
class Repository:
    """What a hub holds, what it was asked for, and where its snapshot of commit c0ffee grows."""

    snapshot: Path
    files: list[str]
    calls: list[dict[str, Any]] = field(default_factory=list)

    def snapshot_download(self, repo_id: str, **settings: Any) -> str:
        self.calls.append({**settings, "repo_id": repo_id})
        wanted = filter_repo_objects(
            self.files, allow_patterns=settings["allow_patterns"], ignore_patterns=settings["ignore_patterns"]
        )
        for name in wanted:
            path = self.snapshot / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"weight_map": {"x": SHARD}} if name == INDEX else {}))
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {path.relative_to(self.snapshot).as_posix() for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "snapshots" / "c0ffee", ["config.json", INDEX, SHARD])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    return repository


def test_a_hub_id_is_downloaded_at_its_revision(hub: Repository) -> None:
    source = resolve_source("org/model", revision="main", token="secret")
    assert (source.folder, source.name, source.revision) == (hub.snapshot, "org/model", "c0ffee")
    assert {(call["repo_id"], call["token"]) for call in hub.calls} == {("org/model", "secret")}
    assert [call["revision"] for call in hub.calls] == ["main", "c0ffee", "c0ffee"], "all of one commit"


@pytest.mark.parametrize(
    ("name", "is_fetched"),
    [
        (SHARD, True),
        (INDEX, True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("merges.txt", True),
        ("pytorch_model.bin", False),
        ("consolidated.00.pth", False),
        ("consolidated.safetensors", False),
        ("model-00001-of-00003.safetensors", False),
        ("model.fp16.safetensors", False),
        ("original/model-00001.safetensors", False),
        ("metal/model.bin", False),
        ("original/config.json", False),
        ("modeling_x.py", False),
        ("README.md", False),
    ],
)
def test_only_needed_files_are_fetched(hub: Repository, name: str, is_fetched: bool) -> None:
    hub.files = list({*hub.files, name})
    resolve_source("org/model")
    assert (name in hub.fetched) == is_fetched


def test_of_a_single_file_and_shards_the_single_file_is_fetched(hub: Repository) -> None:
    hub.files.append("model.safetensors")
    resolve_source("org/model")
    assert hub.fetched == {"config.json", INDEX, "model.safetensors"}


def test_an_adapter_on_the_hub_is_refused_before_its_weights_come(hub: Repository) -> None:
    hub.files += ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"org/model holds a PEFT adapter such as LoRA \(adapter_config\.json"):
        resolve_source("org/model")
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


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
        (lambda: OSError(5, "Input/output error"), "Input/output error"),
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
