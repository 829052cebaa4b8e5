"""Hub ids against a hub on 127.0.0.1: what is fetched, resumed, refused, and deleted when it is converted."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from offload_moe.checkpoint.hub import fetch, hub_errors, open_repository
from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage, repair
from offload_moe.errors import BudgetError, CheckpointError, ConfigError, OffloadMoeError, StoreError, TransferError
from offload_moe.plan import Machine, make_plan
from offload_moe.store import Store, is_store
from tests.support.checkpoints import spread, write_checkpoint
from tests.support.hub import COMMIT, Hub, hub_in_use, running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    write_checkpoint(folder, num_hidden_layers=2, num_experts=6)
    spread(folder, per_shard=5)
    (folder / "README.md").write_text("not needed")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_in_use(checkpoint, tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def shards(hub: Hub) -> list[str]:
    return sorted(name for name in hub.files if name.endswith(".safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a store holds, by name, wherever it lies."""
    store = Store.open(folder)
    found = {name: bytes(store.read_dense(name).reshape(-1).view(torch.uint8).numpy()) for name in store.dense}
    for ordinal, layer in enumerate(store.layers):
        for expert in range(layer.num_experts):
            found[f"{ordinal} {expert}"] = bytes(store.read_expert(ordinal, expert).numpy())
    return found


def test_a_hub_id_is_fetched_into_the_cache_and_converted(
    hub: Hub, checkpoint: Path, shards: list[str], tmp_path: Path
) -> None:
    quantize("org/tiny", tmp_path / "store")
    quantize(checkpoint, tmp_path / "local")
    assert contents(tmp_path / "store") == contents(tmp_path / "local")
    assert (Store.open(tmp_path / "store").source, Store.open(tmp_path / "store").revision) == ("org/tiny", COMMIT)
    assert not {"README.md", "modeling_tiny.py", "pytorch_model.bin"} & hub.sent.keys()
    assert {name: hub.sent[name] for name in shards} == {name: len(hub.files[name]) for name in shards}


def test_shards_are_converted_one_by_one_and_deleted(
    hub: Hub, checkpoint: Path, shards: list[str], tmp_path: Path
) -> None:
    most, phases = 0, set()

    def watch(phase: str, done: float = -1.0, total: float | None = None) -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "store.download").glob("*.safetensors"))))
        phases.add(phase.split()[0])

    quantize("org/tiny", tmp_path / "store", dense_codec="int8", delete_source_shards=True, progress=watch)
    quantize(checkpoint, tmp_path / "local", dense_codec="int8")
    assert len(shards) > 8
    assert 1 <= most <= 5, "a layer's embedding or head may straddle shards, the others must be gone"
    assert contents(tmp_path / "store") == contents(tmp_path / "local")
    assert not (tmp_path / "store.download").exists()
    assert {"Downloading", "Quantizing"} <= phases
    assert not find_damage(Store.open(tmp_path / "store"))


def test_a_store_made_shard_by_shard_is_repaired_like_any_other(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for path in (tmp_path / "store").glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    store = Store.open(tmp_path / "store")
    assert repair(store, find_damage(store), checkpoint) == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def test_a_download_onto_a_full_disk_says_how_much_it_needs(hub: Hub, shards: list[str], tmp_path: Path) -> None:
    (folder := tmp_path / "download").mkdir()
    (folder / f"{shards[0]}.partial").symlink_to("/dev/full")
    repository = open_repository("org/tiny", revision=None, token=None)
    with pytest.raises(
        BudgetError, match=rf"{folder} is full: \d+ KiB are needed, .* free\. Free some space\. Run the"
    ):
        fetch(repository, shards[0], folder / shards[0], lambda done: None)
    named = pytest.raises(BudgetError, match=r"Downloading org/tiny failed: the disk of the hub's cache, .*HF_HOME")
    with named, hub_errors("Downloading org/tiny", "org/tiny", None, advice="Run it again."):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_resumed_conversion_does_not_need_the_deleted_shards(
    hub: Hub, checkpoint: Path, shards: list[str], tmp_path: Path
) -> None:
    """Stopped after each of its steps; what was deleted is never asked for again."""
    kept = dict(hub.files)
    folder = tmp_path / "store.download"
    attempts = 0
    while True:
        attempts += 1
        steps = 0

        def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
            nonlocal steps
            steps += phase == "Quantizing"
            if steps > 7:
                raise KeyboardInterrupt

        before = {path.name for path in folder.glob("*.safetensors")}
        try:
            quantize("org/tiny", tmp_path / "store", delete_source_shards=True, progress=stop)
        except KeyboardInterrupt:
            gone = {name for name in shards if hub.sent.get(name, 0) > len(kept[name])} - before
            for name in gone - {path.name for path in folder.glob("*.safetensors")}:
                hub.files.pop(name, None)  # the hub has it no more
        else:
            break
    assert attempts > 3
    hub.files.update(kept)
    quantize(checkpoint, tmp_path / "local")
    assert contents(tmp_path / "store") == contents(tmp_path / "local")
    assert not folder.exists()


def test_a_download_is_continued_where_it_stopped(
    hub: Hub, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gives up, as after a kill; the next run asks for the rest only."""
    size = len(hub.files[shards[3]])

    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase == f"Downloading {shards[3]}" and done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5_000)
    with pytest.raises(KeyboardInterrupt):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True, progress=stop)
    partial = (tmp_path / "store.download" / f"{shards[3]}.partial").stat().st_size
    assert 0 <= partial < size
    (tmp_path / "store.download" / f"{shards[3]}.partial").write_bytes(hub.files[shards[3]][:3_000])
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert (shards[3], "bytes=3000-") in hub.ranges


def test_a_dropped_connection_is_taken_up_again(
    hub: Hub, checkpoint: Path, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)  # what came after the last whole chunk is lost
    hub.cut[shards[2]] = 3_000
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    quantize(checkpoint, tmp_path / "local")
    assert contents(tmp_path / "store") == contents(tmp_path / "local")
    assert (shards[2], "bytes=3000-") in hub.ranges


@pytest.mark.slow
def test_a_hub_without_ranges_works_too(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.ignores_ranges = True
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    quantize(checkpoint, tmp_path / "local")
    assert contents(tmp_path / "store") == contents(tmp_path / "local")


def test_a_continued_file_with_another_content_is_refused_and_fetched_anew(
    hub: Hub, shards: list[str], tmp_path: Path
) -> None:
    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase == f"Downloading {shards[0]}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True, progress=stop)
    (tmp_path / "store.download" / f"{shards[0]}.partial").write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match="damaged while it was downloaded"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert is_store(quantize("org/tiny", tmp_path / "store", delete_source_shards=True))


@pytest.mark.parametrize("delete", [False, True])
def test_a_single_file_goes_before_an_older_index(
    hub: Hub, checkpoint: Path, shards: list[str], tmp_path: Path, delete: bool
) -> None:
    """As transformers has it, and nothing else is fetched."""
    tensors = {
        name: t.flip(0).contiguous() for path in checkpoint.glob("*.safetensors") for name, t in load_file(path).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hub.files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    quantize("org/tiny", tmp_path / "store", codec="bf16", delete_source_shards=delete)
    dense = Store.open(tmp_path / "store").read_dense("model.embed_tokens.weight")
    assert dense.equal(tensors["model.embed_tokens.weight"])
    assert not set(shards) & hub.sent.keys()
    plan = make_plan("org/tiny", Machine(ram_bytes=1 << 30))
    assert plan.checkpoint_bytes == len(hub.files["model.safetensors"])


def test_what_was_fetched_is_converted_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize("org/tiny", tmp_path / "store", codec="bf16")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    quantize("org/tiny", tmp_path / "again", codec="bf16")
    assert contents(tmp_path / "again") == contents(tmp_path / "store")


def test_a_plan_counts_the_shards_of_the_index(hub: Hub, shards: list[str]) -> None:
    hub.files["model-older.safetensors"] = bytes(10_000)
    plan = make_plan("org/tiny", Machine(ram_bytes=1 << 30))
    assert plan.checkpoint_bytes == sum(len(hub.files[name]) for name in shards)
    assert not set(shards) & hub.sent.keys()


def test_a_plan_of_a_hub_id_knows_a_head_of_its_own(hub: Hub) -> None:
    untied = make_plan("org/tiny", Machine(ram_bytes=1 << 30)).shape
    config = json.loads(hub.files["config.json"])
    assert config["tie_word_embeddings"] is False
    hub.files["config.json"] = json.dumps(config | {"tie_word_embeddings": True}).encode()
    assert make_plan("org/tiny", Machine(ram_bytes=1 << 30)).shape == untied


@pytest.mark.parametrize("delete", [False, True])
def test_an_adapter_is_refused_before_anything_large_comes(hub: Hub, tmp_path: Path, delete: bool) -> None:
    hub.files["adapter_config.json"] = b"{}"
    with pytest.raises(CheckpointError, match="org/tiny holds a PEFT adapter"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=delete)
    with pytest.raises(CheckpointError, match="org/tiny holds a PEFT adapter"):
        make_plan("org/tiny", Machine(ram_bytes=1 << 30))
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_a_download_goes_on_without_file_locks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert is_store(quantize("org/tiny", tmp_path / "store", delete_source_shards=True))


@pytest.mark.parametrize("delete", [False, True])
def test_a_private_repository_needs_its_token(hub: Hub, tmp_path: Path, delete: bool) -> None:
    hub.token = "hf_secret"
    with pytest.raises(TransferError, match="not on the hub, or is private and needs a token"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=delete)
    hub.is_gated = True
    with pytest.raises(TransferError, match="org/tiny is gated"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=delete)
    assert is_store(quantize("org/tiny", tmp_path / "store", token="hf_secret", delete_source_shards=delete))


@pytest.mark.parametrize("delete", [False, True])
def test_a_wrong_revision_is_named(hub: Hub, tmp_path: Path, delete: bool) -> None:
    with pytest.raises(TransferError, match="org/tiny has no revision 'v9'"):
        quantize("org/tiny", tmp_path / "store", revision="v9", delete_source_shards=delete)
    with pytest.raises(TransferError, match="org/other is not on the hub"):
        quantize("org/other", tmp_path / "store2", delete_source_shards=delete)
    assert not (tmp_path / "store").exists()


def test_a_hub_that_is_down_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    for delete in (False, True):
        with pytest.raises(TransferError, match=r"org/tiny (on the hub )?failed: .*") as caught:
            quantize("org/tiny", tmp_path / "store", delete_source_shards=delete)
        assert "\n" not in str(caught.value)


def test_shards_of_a_users_folder_are_never_deleted(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Only shards that were downloaded"):
        quantize(checkpoint, tmp_path / "store", delete_source_shards=True)
    assert list(checkpoint.glob("*.safetensors"))


def test_a_folder_that_is_not_ours_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    foreign = tmp_path / "store.download"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(StoreError, match="no download of ours"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert (foreign / "model.safetensors").read_bytes() == b"precious"


def test_a_begun_download_stays_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True, progress=stop)
    with pytest.raises(StoreError, match="holds a download of org/tiny at its newest revision"):
        quantize("org/tiny", tmp_path / "store", revision="v2", delete_source_shards=True)
    note = json.loads((tmp_path / "store.download" / "offload-moe-download.json").read_text())
    assert note["commit"] == COMMIT


def test_a_full_disk_is_named_before_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.checkpoint.download.shutil.disk_usage", lambda folder: type("", (), {"free": 10}))
    with pytest.raises(BudgetError, match=r"is free\. Free"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/../../evil.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": name}}).encode()
    hub.files[name] = b"x" * 10
    with pytest.raises(OffloadMoeError):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert not list(tmp_path.rglob("evil*"))


def test_only_what_was_downloaded_is_deleted(hub: Hub, tmp_path: Path) -> None:
    """Not what a listing names outside of the folder, nor what somebody else put into it."""
    (tmp_path / "victim.bin").write_bytes(b"precious")
    hub.files["../victim.bin"] = b"x"

    def add(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase == "Quantizing":
            (tmp_path / "store.download" / "mine.bin").write_bytes(b"mine")

    quantize("org/tiny", tmp_path / "store", delete_source_shards=True, progress=add)
    assert (tmp_path / "victim.bin").read_bytes() == b"precious"
    assert [path.name for path in (tmp_path / "store.download").iterdir()] == ["mine.bin"]


def test_shards_in_a_folder_of_their_own_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "a/b.safetensors"}}).encode()
    hub.files["a/b.safetensors"] = b"x" * 10
    with pytest.raises(CheckpointError, match="in a folder of its own"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)


def test_a_format_that_is_read_when_it_is_opened_is_refused_before_a_shard_comes(
    hub: Hub, shards: list[str], tmp_path: Path
) -> None:
    config = json.loads(hub.files["config.json"])
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    hub.files["config.json"] = json.dumps(config | {"quantization_config": settings}).encode()
    with pytest.raises(CheckpointError, match=r"bitsandbytes cannot be converted shard by shard.*without --delete"):
        quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert not set(shards) & {path.name for path in (tmp_path / "store.download").iterdir()}


@pytest.mark.slow
def test_the_command_line_uses_the_endpoint_and_token_of_the_environment(checkpoint: Path, tmp_path: Path) -> None:
    with running(Hub(checkpoint)) as hub:
        hub.token = "hf_secret"
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "offload_moe_cli.main", "quantize", "org/tiny", str(tmp_path / "store")]

        def run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *flags], env={**environment, **variables}, capture_output=True, text=True, check=False
            )

        refused = run("--delete-source-shards")
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-1].startswith("error: org/tiny is not on the hub, or is private")
        assert "Traceback" not in refused.stderr
        done = run("--delete-source-shards", HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        assert is_store(tmp_path / "store")
        assert not (tmp_path / "store.download").exists()
