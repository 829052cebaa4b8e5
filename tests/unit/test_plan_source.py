"""What can be planned: stores, folders, config files and hub ids."""

import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from offload_moe.checkpoint.weight_files import INDEX_NAME
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError, TransferError, UnsupportedModelError
from offload_moe.plan import Machine, make_plan
from offload_moe.plan.source import index_bytes, open_source
from tests.support.plan import CONFIGS, GIB
from tests.support.tiny_models import tiny_model

MACHINE = Machine(ram_bytes=GIB)
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(path)
    return path


def test_a_folder_weighs_what_its_files_weigh(folder: Path) -> None:
    plan = make_plan(folder, MACHINE)
    assert plan.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert plan.checkpoint_is_exact
    assert [part.name for part in plan.placement.disk.fixed] == ["experts", "dense weights"]


def test_a_config_of_any_name_is_enough(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "Tiny.json"
    shutil.copy(folder / "config.json", path)
    plan = make_plan(path, MACHINE)
    assert plan.shape == make_plan(folder, MACHINE).shape
    assert not plan.checkpoint_is_exact
    assert plan.checkpoint_bytes == 2 * plan.shape.total_parameters
    assert [part.name for part in plan.placement.disk.fixed] == ["experts", "dense weights", "download"]


def test_an_index_without_its_files_gives_the_exact_download(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 123_456}, "weight_map": {}}))
    plan = make_plan(tmp_path, MACHINE)
    assert (plan.checkpoint_bytes, plan.checkpoint_is_exact) == (123_456, True)
    assert plan.placement.disk.fixed[-1].num_bytes == 123_456


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": 5}', "[" * 100_000])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME} is not a shard index"):
        index_bytes(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"metadata": {}}', '{"metadata": {"total_size": "big"}}'])
def test_an_index_that_does_not_say_leaves_an_estimate(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    assert index_bytes(tmp_path) is None


def test_a_store_keeps_its_codecs(folder: Path, tmp_path: Path) -> None:
    store = quantize(folder, tmp_path / "store", codec="int8", dense_codec="nf4")
    plan = make_plan(store, MACHINE)
    assert (plan.settings.codec, plan.placement.dense_codec) == ("int8", "nf4")
    assert plan.placement.disk.fixed == ()
    with pytest.raises(ConfigError, match="The store has int8; --codec nf4 needs another store"):
        make_plan(store, MACHINE, codec="nf4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/model/here", "is neither a file or folder, nor a hub id"),
        ("", "is not a model folder: it has no config.json"),
        ("broken.json", r"broken\.json cannot be read"),
        ("typeless.json", r"typeless\.json is not a model config"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "typeless.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message) as raised:
        make_plan(tmp_path / name, MACHINE)
    assert str(tmp_path / name) in str(raised.value)


def test_an_architecture_that_transformers_knows_is_enough() -> None:
    config = open_source(CONFIGS / "Kimi-K2-Instruct.json").config
    assert config.model_type == "deepseek_v3"
    assert config.n_routed_experts == 384


def test_a_known_architecture_with_unusable_values_is_refused(tmp_path: Path) -> None:
    raw = json.loads((CONFIGS / "Kimi-K2-Instruct.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": "no"}))
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        make_plan(tmp_path, MACHINE)


def test_a_checkpoint_in_mxfp4_keeps_its_format() -> None:
    plan = make_plan(CONFIGS / "gpt-oss-120b.json", MACHINE)
    assert plan.settings.codec == "mxfp4"
    assert list(plan.store_bytes) == ["mxfp4", "nf4", "int8", "bf16"]
    assert plan.store_bytes["mxfp4"] > plan.store_bytes["nf4"]
    assert "mxfp4" not in make_plan(CONFIGS / "Mixtral-8x7B-v0.1.json", MACHINE).store_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "mxfp4"}, "--codec mxfp4 does not suit this model. Choose one of: nf4, int8, bf16"),
        ({"dense_codec": "mxfp4"}, "--dense-codec mxfp4 does not suit this model"),
        ({"context": 0}, "A context of 0 tokens is not usable"),
        ({"context": 513}, "takes at most 512 tokens, --context is 513"),
        ({"codec": "q9"}, "Unknown codec 'q9'"),
        ({"dense_codec": "q9"}, "Unknown codec 'q9'"),
    ],
)
def test_unusable_settings_are_named(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(folder, MACHINE, **settings)  # type: ignore[arg-type]


def test_the_context_is_8192_or_what_the_model_takes(folder: Path) -> None:
    assert make_plan(folder, MACHINE).placement.context == 512
    big = Machine(ram_bytes=64 * GIB)
    assert make_plan(CONFIGS / "Mixtral-8x7B-v0.1.json", big).placement.context == 8192


class Hub(BaseHTTPRequestHandler):
    """A hub with one open repository, one gated and one without a config."""

    requested: tuple[str, ...] = ()

    def do_GET(self) -> None:
        Hub.requested += (self.path,)
        repo = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if repo == "org/gated":
            return self._refuse(403, "GatedRepo")
        if repo == "org/absent":
            return self._refuse(404, "RepoNotFound")
        if "/nowhere" in self.path:
            return self._refuse(404, "RevisionNotFound")
        if self.path.startswith("/api/models/"):
            files = [("model-1.safetensors", 700), ("model-2.safetensors", 300), ("original/model.safetensors", 5000)]
            siblings = [{"rfilename": name, "size": size} for name, size in files]
            return self._answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if self.path.endswith(f"/resolve/{COMMIT}/config.json") and repo == "org/tiny":
            return self._answer((CONFIGS / "Mixtral-8x7B-v0.1.json").read_bytes())
        return self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    Hub.requested = ()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield endpoint
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_of_a_hub_id_only_the_config_is_fetched() -> None:
    source = open_source("org/tiny")
    assert source.config.model_type == "mixtral"
    assert (source.checkpoint_bytes, source.shard_bytes) == (1000, 700)
    assert not source.is_local
    assert not [path for path in Hub.requested if "safetensors" in path]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("repo", "revision", "error", "message"),
    [
        ("org/gated", None, TransferError, "org/gated is gated"),
        ("org/absent", None, TransferError, "org/absent is not on the hub"),
        ("org/tiny", "nowhere", TransferError, "org/tiny has no revision 'nowhere'"),
        ("org/empty", None, CheckpointError, "org/empty is not a transformers model: it has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_named(repo: str, revision: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(repo, revision=revision)


def test_a_hub_that_cannot_be_reached_is_named(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match=r"^Looking up org/tiny on the hub failed: "):
        open_source("org/tiny")
