"""A checkpoint's layer for multi-token prediction in stores: converted, kept apart, loaded where it is asked for."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import open_model
from torch import Tensor
from transformers import AutoConfig

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.mtp import brings_mtp
from offload_moe.checkpoint.mtp_forms import why_left_out
from offload_moe.convert.jobs import plan_conversion
from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage, repair
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError, StoreCorrupt
from offload_moe.plan import Machine, make_plan
from offload_moe.quant import get_codec
from offload_moe.residency.popularity import POPULARITY_NAME
from offload_moe.store import Store
from offload_moe.store.installed import describe, remove
from offload_moe.store.upgrade import upgrade
from tests.support.checkpoints import spread, write_checkpoint
from tests.support.cli import load_cli
from tests.support.guesses import compute_guesses
from tests.support.mtp import FIRST, round_as_fp8, settings_of, to_fp8_checkpoint, write_mtp_checkpoint
from tests.support.quantized import edit_tensors
from tests.support.stores import assert_same_stores, check_all, to_version_1

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
FILE = "mtp-00001.safetensors"
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mtp_checkpoint(tmp_path_factory.mktemp("mtp") / "model")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    return quantize(checkpoint, checkpoint.parent / "store")


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Path:
    """The store of the same model without the layer."""
    folder = Path(shutil.copytree(checkpoint, checkpoint.parent / "plain"))
    edit_tensors(folder, without(FIRST))
    return quantize(folder, checkpoint.parent / "plain-store")


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "copy", ignore=shutil.ignore_patterns(POPULARITY_NAME)))


@pytest.fixture
def every_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_guesses(monkeypatch, 3)


def without(start: str) -> Edit:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(start)}


def changed(name: str, value: Tensor) -> Edit:
    return lambda tensors: tensors | {FIRST + name: value}


def num_keys(model: Model) -> int:
    return model.engine.hierarchy.pools.keys.total


def test_it_is_kept_beside_the_model(checkpoint: Path, store: Path, plain: Path) -> None:
    found, other = Store.open(store), Store.open(plain)
    assert settings_of(store)["version"] == 4
    assert settings_of(plain)["version"] == 2
    assert_same_stores(store, plain)
    assert (found.experts_bytes, found.dense_bytes) == (other.experts_bytes, other.dense_bytes)
    assert other.mtp is None
    assert found.mtp is not None
    assert [layer.name for layer in found.mtp.layers] == ["model.layers.0.mlp.experts"]
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & found.mtp.dense.keys()
    with Checkpoint(checkpoint) as opened:
        for name, part in (("eh_proj.weight", "eh_proj.weight"), ("model.norm.weight", "shared_head.norm.weight")):
            assert torch.equal(found.mtp.read_dense(name), opened.tensors.read(FIRST + part))
        assert opened.mtp is not None
        codec, shape = get_codec("nf4"), found.mtp.layers[0].shape
        given = opened.mtp.expert(0, 2)
        kept = codec.decode(shape, found.mtp.read_expert(0, 2), torch.float32)
        assert (kept["down_proj"] - given["down_proj"].float()).abs().mean() < 0.02
    files = {found.mtp.record(0, 0).path.name, found.record(len(found.layers), 3).path.name}
    assert files == {FILE}
    assert torch.equal(found.read_expert(len(found.layers), 1), found.mtp.read_expert(0, 1))
    check_all(found)


def test_a_model_without_guesses_neither_reads_nor_counts_it(plain: Path, copied: Path) -> None:
    damaged = copied / FILE
    damaged.write_bytes(bytes(damaged.stat().st_size))
    sizes: dict[str, Any] = {"context": 512, "ram": "2GiB"}
    with load(plain, **sizes) as model, load(copied, speculate="off", **sizes) as other:
        assert other.engine.mtp is None
        assert other.placement == model.placement
        assert num_keys(other) == num_keys(model)
        assert other.summary == model.summary
        assert other.generate("Hello", max_new_tokens=9) == model.generate("Hello", max_new_tokens=9)
    with pytest.raises(StoreCorrupt, match="mtp-00001"):
        load(copied, speculate="mtp", context=512)


def test_damage_is_found_and_repaired(checkpoint: Path, copied: Path) -> None:
    place = Store.open(copied).record(2, 3)
    good = (copied / FILE).read_bytes()
    for at in (0, place.offset + 5, len(good) - 3):
        (copied / FILE).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        damages = find_damage(Store.open(copied))
        assert len(damages) == 1
        assert not repair(Store.open(copied), damages, checkpoint)
        assert (copied / FILE).read_bytes() == good


def test_an_upgrade_rewrites_it(store: Path, copied: Path) -> None:
    to_version_1(copied)
    before = Store.open(copied)
    assert before.mtp is not None
    assert before.order_of("layers.2.experts.0") == "rows"
    assert upgrade(copied) > 1
    assert_same_stores(copied, store)
    after, expected = Store.open(copied).mtp, Store.open(store).mtp
    assert after is not None
    assert expected is not None
    assert settings_of(copied)["version"] == 4
    assert torch.equal(after.read_expert(0, 1), expected.read_expert(0, 1))
    assert after.record(0, 1).path.name == "mtp-00001-panels.safetensors"
    found = describe(copied)
    assert found is not None
    remove(found)
    assert not copied.exists()


@pytest.mark.parametrize("dense_codec", ["bf16", "int8"])
def test_fp8_becomes_what_it_stands_for(checkpoint: Path, tmp_path: Path, dense_codec: str) -> None:
    stores = []
    for name in ("fp8", "bf16"):
        folder = Path(shutil.copytree(checkpoint, tmp_path / name))
        if name == "fp8":
            to_fp8_checkpoint(folder)
        else:
            edit_tensors(folder, round_as_fp8)
        stores.append(Store.open(quantize(folder, tmp_path / f"{name}-store", dense_codec=dense_codec)).mtp)
    assert None not in stores
    assert_parts_alike(*stores)


def assert_parts_alike(one: Store | None, other: Store | None) -> None:
    assert one is not None
    assert other is not None
    assert one.dense.keys() == other.dense.keys()
    assert all(torch.equal(one.read_dense(name), other.read_dense(name)) for name in one.dense)
    assert all(torch.equal(one.read_expert(0, expert), other.read_expert(0, expert)) for expert in range(4))


def test_shard_by_shard_it_has_files_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "spread"))
    spread(folder, 20)
    with Checkpoint(folder) as opened:
        files, jobs = plan_conversion(opened, get_codec("nf4"), get_codec("int8"), by_shard=True)
    kinds = {"mtp": set[str](), "dense": set[str](), "experts": set[str]()}
    for file in files:
        kinds[file.name.partition("-")[0]] |= {blob.name for blob in file.blobs}
    assert {name.partition(".")[0] for name in kinds["mtp"]} == {"mtp", "layers"}
    assert {name for name in kinds["mtp"] if name.startswith("layers")} == {f"layers.2.experts.{e}" for e in range(4)}
    assert not any(name.startswith("mtp.") for name in kinds["dense"] | kinds["experts"])
    assert [job.blob for job in jobs] == [blob for file in files for blob in file.blobs]


HALVES: dict[str, tuple[Edit, str]] = {
    "a projection": (without(f"{FIRST}eh_proj."), r"no tensor brings eh_proj.weight \(1 parameters are missing"),
    "an expert": (without(f"{FIRST}mlp.experts.2"), "experts"),
    "another shape": (changed("hnorm.weight", torch.ones(63, dtype=torch.bfloat16)), r"hnorm.weight is \[63\]"),
    "a part too many": (changed("self_attn.gate.weight", torch.ones(3, 3)), "layers.3.self_attn.gate.weight has no"),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_of_it_is_left_out_with_a_word(name: str, checkpoint: Path, plain: Path, tmp_path: Path) -> None:
    folder, said = Path(shutil.copytree(checkpoint, tmp_path / "half")), list[str]()
    edit, reason = HALVES[name]
    edit_tensors(folder, edit)
    half = quantize(folder, tmp_path / "half-store", on_notice=said.append)
    assert any("multi-token prediction is left out" in text and re.search(reason, text) for text in said), said
    assert Store.open(half).mtp is None
    assert_same_stores(half, plain)


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("mellum", "mtp.fc.weight", "layers of this family do not decode natively"),
        ("exaone_moe", "mtp.layers.0.mlp.gate_proj.weight", "what its layer computes is not established"),
        ("step3p7", "model.layers.45.eh_proj.weight", "several layers that follow each other"),
        ("minimax_m3_vl", "mtp.layers.0.norm.weight", "do not decode natively"),
        ("ernie4_5_moe", "model.mtp_emb_norm.0.weight", "no norm in front of the head"),
        ("qwen4_exp_text", "mtp.fc.weight", "this version does not load"),
    ],
)
def test_that_of_other_families_is_left_out_by_name(family: str, name: str, reason: str) -> None:
    config = AutoConfig.for_model(family)
    tensors = ["model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "a.position_ids"]
    assert why_left_out(config, tensors) == ""
    assert reason in why_left_out(config, [*tensors, name])
    assert not brings_mtp(config, [name])


def test_a_conversion_says_what_it_leaves_out(plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Tensors of a family's class that no module has are ignored, as transformers does."""
    write_checkpoint(tmp_path / "model", "exaone_moe", shard_size="1GB")
    edit_tensors(tmp_path / "model", lambda tensors: tensors | {"mtp.fc.weight": torch.ones(3, 3)})
    with Checkpoint(tmp_path / "model") as opened:
        assert opened.mtp is None
        assert any("multi-token prediction are left out" in text and "(exaone_moe)" in text for text in opened.notices)


def test_it_stands_beside_a_language_model_with_images(tmp_path: Path) -> None:
    """As Qwen3.5 has it: the model's names are those of a part, the layer's are not."""
    folder = write_mtp_checkpoint(tmp_path / "model", "qwen3_5_moe_text")
    expected = quantize(folder, tmp_path / "expected")
    edit_tensors(
        folder,
        lambda tensors: {re.sub(r"^model\.", "model.language_model.", name): each for name, each in tensors.items()},
    )
    text = settings_of(folder, "config.json")
    config = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    machine = Machine(ram_bytes=2 << 30)
    cost = make_plan(folder, machine, context=512).mtp
    assert cost is not None
    got = quantize(folder, tmp_path / "store")
    assert make_plan(got, machine, context=512).mtp == cost
    assert make_plan(folder / "config.json", machine, context=512).mtp == cost
    assert_same_stores(got, expected)
    with load(got, speculate="mtp", context=512) as model:
        assert model.engine.mtp is not None
        answers = [model.generate("Hello", max_new_tokens=20, speculate=choice) for choice in ("mtp", "off")]
        assert answers[0] == answers[1]


def test_a_store_without_it(plain: Path) -> None:
    """Such as one that an older version converted."""
    with load(plain, context=512) as model:
        assert model.engine.mtp is None
        with pytest.raises(ConfigError, match="loaded without its layer for multi-token prediction"):
            model.generate("Hi", speculate="mtp")
    with pytest.raises(ConfigError, match="has no layer for multi-token prediction"):
        load(plain, speculate="mtp", context=512)


def test_it_is_not_loaded_where_no_tokens_are_guessed(store: Path) -> None:
    with load(store, speculate="mtp", fast_path=False, context=512) as model:
        assert model.engine.mtp is None
        assert any(text.startswith("No tokens are guessed: ") for text in model.notices)
        assert model.generate("Hello", max_new_tokens=3, speculate="mtp")


def test_it_is_loaded_where_it_fits(store: Path) -> None:
    with load(store, context=512) as model:
        assert model.engine.mtp is not None
        assert model.summary.endswith("; with multi-token prediction")
        whole = model.placement.ram
    with load(store, speculate="off", context=512) as model:
        least = model.placement.ram.bytes_with(4)
    assert whole.fixed_bytes > model.placement.ram.fixed_bytes
    with load(store, ram=least, context=512) as model:
        assert model.engine.mtp is None  # the experts of a token have no slots beside it
        assert model.placement.ram.num_slots == 4
    with load(store, ram=least + 200_000, speculate="mtp", context=512) as model:
        assert model.engine.mtp is not None


def test_plan_says_what_it_costs(
    checkpoint: Path, store: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(ram_bytes=2 << 30)
    cost = make_plan(store, machine, context=512).mtp
    part = Store.open(store).mtp
    assert cost is not None
    assert part is not None
    assert cost.store_bytes == part.experts_bytes + part.dense_bytes == Store.open(store).mtp_bytes
    assert cost.num_experts == 4
    sizes: dict[str, Any] = {"context": 512, "ram": "2GiB"}
    with load(store, speculate="mtp", **sizes) as model, load(store, speculate="off", **sizes) as other:
        more = model.placement.ram.fixed_bytes - other.placement.ram.fixed_bytes
        assert more >= cost.memory_bytes > 0.9 * more  # with a share of the activations
        assert model.memory["dense weights"] - other.memory["dense weights"] < cost.memory_bytes
    assert make_plan(checkpoint, machine, context=512).mtp == cost
    spread(Path(shutil.copytree(checkpoint, tmp_path / "spread")), 20)
    assert make_plan(tmp_path / "spread", machine, context=512).mtp == cost
    assert make_plan(checkpoint / "config.json", machine, context=512).mtp == cost
    assert make_plan(plain, machine, context=512).mtp is None
    assert make_plan(checkpoint.parent / "plain", machine, context=512).mtp is None
    assert load_cli().main(["plan", str(store), "--context", "512"]) == 0
    assert "Beside that, for multi-token prediction: " in capsys.readouterr().out
    assert load_cli().main(["info", str(store)]) == 0
    assert "guesses      multi-token prediction, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chosen", "num_slots", "settings"),
    [
        ("mtp", None, {"temperature": 0}),
        ("mtp", 6, {"temperature": 1.2, "seed": 4}),
        ("auto", 6, {"temperature": 0}),
    ],
)
def test_answers_are_the_same(
    store: Path, chosen: Any, num_slots: int | None, settings: dict[str, Any], every_guess: None
) -> None:
    with open_model(store, num_slots, speculate="mtp", context=512) as model:
        sessions = [model.chat(), model.chat()]
        for text in ("Hello", "Hello again", "And once more, with a message that is longer than eight tokens"):
            answers = [
                "".join(piece.text for piece in session.send(text, max_new_tokens=20, speculate=choice, **settings))
                for session, choice in zip(sessions, (chosen, "off"), strict=True)
            ]
            assert answers[0] == answers[1]
            assert sessions[0].last_stats is not None
            assert sessions[0].last_stats.guesses is not None
            assert sessions[0].last_stats.guesses.num_guessed > 10


def test_a_model_that_is_dropped_takes_it_along(store: Path) -> None:
    model = load(store, speculate="mtp", context=512)
    assert model.generate("Hello", max_new_tokens=3)
    gone = [weakref.ref(each) for each in (model.hf, model.engine.mtp, model.engine.hierarchy)]
    del model
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_traces_are_of_the_model_itself(store: Path) -> None:
    with load(store, speculate="mtp", context=512) as model, model.trace() as recorder:
        model.generate("Hello", max_new_tokens=5)
    assert recorder.trace().num_layers == 2
