"""What a user may call a model, a card or a policy; what is said of a name that is not known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload_moe.convert.sources import ensure_store, find_source
from offload_moe.errors import CheckpointError, ConfigError, OffloadMoeError, StoreError
from offload_moe.simulate.hardware import CARDS, card_named
from offload_moe.store.installed import find, resolve_installed
from offload_moe.system.names import check_installed, check_model, choice, hub_name, resolve, resolve_whole
from tests.support.cli import ROOT, environment, load_cli

BUILT = "SmolLM2-135M-Instruct-MoE-01234567"
STORES = ("Mixtral-8x7B-nf4-bf16-aa", "Mixtral-8x7B-int8-bf16-bb", "OLMoE-1B-7B-nf4-bf16-cc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders with the names of stores, and one conversion that was stopped."""
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    for name in (*STORES, "half"):
        (tmp_path / "stores" / name).mkdir(parents=True)
    begun = {"source": "org/half", "revision": "abc", "codec": "int8", "dense codec": "bf16"}
    (tmp_path / "stores" / "half" / "conversion.journal").write_text(json.dumps(begun) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/Qwen/Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B", None)),
        ("https://huggingface.co/Qwen/Qwen3-30B-A3B/", ("Qwen/Qwen3-30B-A3B", None)),
        ("http://hf.co/org/model-1.5/tree/v2.0/", ("org/model-1.5", "v2.0")),
        ("huggingface.co/org/model/blob/main/config.json?download=true", ("org/model", "main")),
        ("https://huggingface.co/org/model/tree/refs%2Fpr%2F3#files", ("org/model", "refs/pr/3")),
        ("org/model", ("org/model", None)),
        ("/data/huggingface.co/org/model", ("/data/huggingface.co/org/model", None)),
    ],
)
def test_pages_of_the_hub_are_names(url: str, expected: tuple[str, str | None]) -> None:
    assert hub_name(url) == expected
    assert hub_name(url, expected[1] or "dev") == (expected[0], expected[1] or "dev")


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/datasets/org/data",
        "https://hf.co/models",
        "https://huggingface.co/org/model/discussions/3",
    ],
)
def test_other_pages_of_the_hub_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no model on the hub"):
        hub_name(url)


def test_a_page_and_a_flag_may_not_name_two_revisions() -> None:
    with pytest.raises(ConfigError, match="names the revision main, --revision is dev"):
        hub_name("https://hf.co/org/model/tree/main", "dev")


def test_the_beginning_of_one_name_will_do(cache: Path) -> None:
    assert resolve("OLM") == cache / "stores" / STORES[2]
    assert resolve("Mixtral-8x7B-i") == cache / "stores" / STORES[1]
    assert resolve(STORES[0]) == cache / "stores" / STORES[0]
    with pytest.raises(StoreError, match=r"could be any of: Mixtral-8x7B-int8-bf16-bb, Mixtral-8x7B-nf4-bf16-aa\."):
        resolve("Mixtral")
    assert resolve("tral-8x7B") == Path("tral-8x7B")
    assert resolve_whole("OLM") == Path("OLM")
    assert resolve_whole(STORES[0]) == cache / "stores" / STORES[0]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("olmoe-1b", "Did you mean OLMoE-1B-7B-nf4-bf16-cc?"),
        ("Mixtral-8x7b-nf4", "Did you mean Mixtral-8x7B-nf4-bf16-aa?"),
        ("dmeo", "Did you mean demo?"),
        ("zzz", "Check the path."),
        ("../zzz", "Check the path."),
    ],
)
def test_wrong_names_are_answered_with_close_ones(cache: Path, name: str, advice: str) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        check_model(name)
    assert str(caught.value).endswith(advice)
    if advice != "Check the path.":
        with pytest.raises(StoreError, match="`offload-moe list`") as refused:
            check_installed(name)
        assert advice in str(refused.value)
    with pytest.raises(CheckpointError, match="nor a hub id"):
        ensure_store(name, codec=None, dense_codec="bf16", revision=None, token=None)


def test_what_can_be_meant_is_let_through(cache: Path, tmp_path: Path) -> None:
    for name in ("demo", "org/model", "https://hf.co/org/model", "OLM", tmp_path, str(tmp_path)):
        check_model(name)


@pytest.mark.parametrize("command", ["chat", "plan", "simulate", "info", "verify", "rm", "profile"])
def test_a_wrong_name_is_said_at_once(tmp_path: Path, command: str) -> None:
    """Before torch is imported, which takes seconds: counted in seconds of the processor."""
    begin = sum(os.times()[2:4])
    code = (
        "import sys; from tests.support.cli import load_cli; status = load_cli().main(sys.argv[1:]);"
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, command, "no-such-model"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no-such-model is n")
    assert sum(os.times()[2:4]) - begin < 0.5


def test_an_unfinished_store_says_how_it_goes_on(cache: Path) -> None:
    path = cache / "stores" / "half"
    line = f"Resume it with: offload-moe quantize org/half {path} --codec int8 --dense-codec bf16 --revision abc"
    calls = (
        lambda: ensure_store("half", codec=None, dense_codec="bf16", revision=None, token=None),
        lambda: find_source(path),
    )
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        assert str(caught.value) == f"{path} is an unfinished conversion. {line}"


def test_the_demo_is_its_store_where_stores_are_meant(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.store.installed.checkpoint_folder", lambda root: root / "demo" / BUILT)
    with pytest.raises(StoreError, match="not built yet"):
        find("demo")
    (cache / "demo" / BUILT).mkdir(parents=True)
    assert find("demo").kind == "demo"
    (cache / "stores" / f"{BUILT}-nf4-bf16-dd").mkdir()
    assert resolve_installed("demo") == cache / "stores" / f"{BUILT}-nf4-bf16-dd"
    (cache / "stores" / f"{BUILT}-int8-bf16-ee").mkdir()
    with pytest.raises(StoreError, match=r"several stores.*int8"):
        resolve_installed("demo")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("GeForce_3060", "rtx-3060"),
        ("Tesla T4", "t4"),
        ("a100 80GB", "a100-80gb"),
        ("RTX A6000", "rtx-a6000"),
        ("4060 Ti 16GB", "rtx-4060-ti-16gb"),
    ],
)
def test_cards_are_known_however_they_are_written(written: str, name: str) -> None:
    assert card_named(written) is CARDS[name]


@pytest.mark.parametrize("written", ["4060", "5070", "rtx", "", "a100", "9090"])
def test_no_card_is_taken_for_another(written: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no card .* Choose one of: t4, rtx-3060"):
        card_named(written)


def test_a_choice_names_what_is_close_and_what_there_is() -> None:
    assert choice("policy", "lru", ("lru", "knn")) == "lru"
    with pytest.raises(ConfigError, match=r"There is no policy 'kn'\. Did you mean knn\? Choose one of: lru, knn\."):
        choice("policy", "kn", ("lru", "knn"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "lruu"], "There is no policy 'lruu'. Did you mean lru?"),
        (["--context", "0"], "A context of '0' tokens is not usable."),
        (["--context", "-5"], "A context of '-5' tokens is not usable."),
        (["--context", "nan"], "A context of 'nan' tokens is not usable."),
        (["--ram", "64"], "'64' has no unit. Did you mean 64GiB?"),
        (["--vram", "1e99GiB"], "Cannot read '1e99GiB' as a size."),
        (["--vram", "9" * 400 + "GiB"], "is not a size of a memory."),
    ],
)
def test_settings_are_checked_at_once(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_cli().main(["chat", "demo", *flags]) == 1
    assert message in capsys.readouterr().err


def test_load_checks_its_settings_before_it_reads_anything() -> None:
    from offload_moe import load

    for settings in ({"policy": "lruu"}, {"context": 0}, {"context": 1.5}, {"ram": "64"}, {"vram": -1}):
        with pytest.raises(OffloadMoeError, match=r"policy|context|unit|size"):
            load("no-such-model", **settings)  # type: ignore[arg-type]
