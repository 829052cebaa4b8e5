"""GGUF files used as they lie: the model of the decoded weights, from any part, without a copy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe import load
from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.convert import gguf as convert_gguf
from offload_moe.convert.quantize import quantize
from offload_moe.convert.sources import ensure_view
from offload_moe.engine.model import Model
from offload_moe.errors import CheckpointError, ConfigError, StoreError
from offload_moe.memory import unused_card
from offload_moe.memory.nvidia import Nvidia
from offload_moe.plan.machine import Machine
from offload_moe.plan.plan import make_plan
from offload_moe.quant.gguf import TYPES
from offload_moe.store import Store
from tests.support.gguf_models import SETTINGS, TEMPLATE, write_model
from tests.support.gguf_records import PLAIN
from tests.support.hub import hub_in_use

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 7, 260]])
ROUNDED = 0.04  # relative, of most tokens: int8 activations; one whose routing changes is further off


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits_of(source: Path | str, **options: Any) -> Tensor:
    with load(source, **options) as model, torch.no_grad():
        found: Tensor = model.hf(IDS).logits
        return found


def answer(model: Model) -> list[int]:
    """Greedy ids, token by token."""
    with torch.no_grad():
        ids: list[int] = model.hf.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    return ids


def errors_of(found: Tensor, expected: Tensor) -> Tensor:
    """Relative, of each token."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


@pytest.mark.parametrize("family", SETTINGS)
def test_logits_are_those_of_the_decoded_weights(family: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, family)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5
    assert errors_of(logits_of(written.path), expected).median() < ROUNDED


def test_the_language_model_of_an_architecture_with_images(tmp_path: Path) -> None:
    metadata = {"qwen3vlmoe.rope.dimension_sections": [24, 20, 20, 0], "qwen3vlmoe.n_deepstack_layers": 3}
    written = write_model(tmp_path, "qwen3_moe", architecture="qwen3vlmoe", metadata=metadata)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5


def test_keys_and_values_of_the_latent_in_one(tmp_path: Path) -> None:
    """As files had them until 2025: as many heads of keys as of queries."""
    old = {"head_count_kv": 4, "key_length": 96, "value_length": 64, "key_length_mla": None, "value_length_mla": None}
    metadata = {f"deepseek2.attention.{key}": value for key, value in old.items()}
    written = write_model(tmp_path, "deepseek_v3", is_latent_split=False, metadata=metadata)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5
    assert errors_of(logits_of(written.path), expected).median() < ROUNDED


@pytest.mark.parametrize("kind", TYPES)
def test_types(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, "qwen3_moe", kind, {"none": kind})
    with torch.no_grad():
        expected = written.hf(IDS).logits
    found = errors_of(logits_of(written.path), expected)
    assert found.max() < 1e-5 if kind in PLAIN else found.median() < ROUNDED
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5


def test_layers_and_matrices_of_several_types(tmp_path: Path) -> None:
    kinds = {
        "ffn_up_exps": "Q5_K",
        "ffn_down_exps": "Q3_K",
        "attn_k": "Q8_0",
        "attn_output": "F16",
        "ffn_gate_exps": "IQ4_XS",
    }
    written = write_model(tmp_path, "qwen3_moe", "Q4_K", kinds)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    with load(written.path) as model, torch.no_grad():
        assert [layer.codec for layer in model.store.layers] == ["gguf:IQ4_XS,Q5_K,Q3_K"] * 2
        assert errors_of(model.hf(IDS).logits, expected).median() < ROUNDED


def test_experts_in_mxfp4_with_biases(tmp_path: Path) -> None:
    """gpt-oss as it is published: rows of gate and up alternate in its module, biases lie apart."""
    experts = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "MXFP4")
    written = write_model(tmp_path / "model", "gpt_oss", "Q8_0", experts, tensors_per_file=7)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5
    found = logits_of(written.path)
    assert errors_of(found, expected).median() < ROUNDED
    store = quantize(written.path, tmp_path / "store")
    assert Store.open(store).layers[0].codec == "gguf:MXFP4,MXFP4,MXFP4"
    assert torch.equal(logits_of(store), found)


def test_gated_delta_rules_keep_their_types(tmp_path: Path) -> None:
    """Rows that change places, and heads of columns whose blocks do: bytes are moved, nothing is rounded."""
    written = write_model(tmp_path, "qwen3_5_moe_text", "Q8_0", {"attn_gate": "Q4_K"})
    with load(written.path, exact=True) as model, torch.no_grad():
        rule = model.hf.model.layers[0].linear_attn
        kinds = [rule.in_proj_qkv, rule.in_proj_z, rule.in_proj_a, rule.out_proj]
        assert [linear.codec.name for linear in kinds] == ["gguf:Q8_0", "gguf:Q4_K", "gguf:Q8_0", "gguf:Q8_0"]
        assert errors_of(model.hf(IDS).logits, written.hf(IDS).logits).max() < 1e-5
    written = write_model(tmp_path / "mixed", "qwen3_next", "Q8_0", {"attn_gate": "Q4_K"})
    with load(written.path, exact=True) as model:
        assert isinstance(model.hf.model.layers[0].linear_attn.in_proj_qkvz, torch.nn.Linear)  # of two types


@pytest.mark.parametrize("decay", [0.5, float("nan")])
def test_decays_without_a_logarithm(decay: float, tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_5_moe_text").path
    place = read_gguf([path]).tensors["blk.0.ssm_a"]
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(np.float32(decay).tobytes())
    with pytest.raises(CheckpointError, match=r"model\.gguf: blk\.0\.ssm_a: decays from .* where all are negative"):
        load(path)


def test_experts_in_numbers_beside_quantized_ones(tmp_path: Path) -> None:
    """Where they lie and in a store, of widths that no quantized type takes, and with biases."""
    written = write_model(tmp_path / "narrow", "qwen3_moe", "F16", {"ffn_up_exps": "F32"}, moe_intermediate_size=96)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path), expected).max() < 1e-5
    kinds = {"ffn_gate_exps": "Q4_K", "ffn_up_exps": "F16", "ffn_down_exps": "BF16"}
    written = write_model(tmp_path / "model", "gpt_oss", "F16", kinds)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    found = logits_of(written.path)
    assert errors_of(found, expected).median() < ROUNDED
    store = quantize(written.path, tmp_path / "store")
    assert Store.open(store).layers[0].codec == "gguf:Q4_K,F16,BF16"
    assert torch.equal(logits_of(store), found)


def test_dense_matrices_in_f16_stay_in_16_bits(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe", "F16", {}).path
    with load(path) as model:
        attention = model.hf.model.layers[0].self_attn
        assert attention.q_proj.codec.name == "gguf:F16"
        assert attention.q_proj.record.numel() == 2 * 256 * 256


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("glm4_moe", "glm4moe"), ("deepseek_v3", "deepseek2"), ("qwen3_5_moe_text", "qwen35moe")],
)
def test_a_layer_for_multi_token_prediction(family: str, architecture: str, tmp_path: Path) -> None:
    """It is no layer of the model. Where types are kept it is left out with a notice; other stores keep it."""
    shapes = {"enorm": (256,), "hnorm": (256,), "shared_head_norm": (256,), "eh_proj": (256, 512)}
    random = np.random.default_rng(0)
    more = {f"blk.3.nextn.{name}.weight": random.normal(0, 0.1, shape).astype("f4") for name, shape in shapes.items()}
    metadata = {f"{architecture}.nextn_predict_layers": 1}
    settings = {"layer_types": ["linear_attention", "full_attention"] * 2} if "qwen" in family else {}
    written = write_model(tmp_path / "model", family, num_hidden_layers=4, metadata=metadata, more=more, **settings)
    with load(written.path, exact=True) as model, torch.no_grad():
        del written.hf.model.layers[3]
        expected = written.hf(IDS).logits
        assert errors_of(model.hf(IDS).logits, expected).max() < 1e-5
        assert any("multi-token prediction of the GGUF file is left out" in notice for notice in model.notices)
    store = Store.open(quantize(written.path, tmp_path / "store", codec="int8"))
    assert errors_of(logits_of(store.path), expected).median() < 2.5 * ROUNDED  # another rounding
    assert store.mtp is not None
    found = store.mtp.read_dense("eh_proj.weight")
    assert np.array_equal(found.float().numpy(), more["blk.3.nextn.eh_proj.weight"])


def test_any_part_stands_for_the_whole_file(tmp_path: Path) -> None:
    whole = logits_of(write_model(tmp_path / "whole", "qwen2_moe").path)
    first = write_model(tmp_path / "parts", "qwen2_moe", tensors_per_file=3).path
    parts = sorted(first.parent.iterdir())
    assert len(parts) > 5
    for part in (parts[0], parts[3], parts[-1]):
        assert torch.equal(logits_of(part), whole)
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"of this GGUF file 1 are missing: {parts[2].name}"):
        load(parts[4])


def test_nothing_is_written_but_a_small_folder(tmp_path: Path, cache: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    before = path.read_bytes()
    logits_of(path)
    written = [file for file in cache.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in written) < 100_000
    assert path.read_bytes() == before
    assert len([*(cache / "stores").iterdir()]) == 1
    logits_of(path)
    assert len([*(cache / "stores").iterdir()]) == 1


def test_experts_arrive_from_the_disk_in_their_windows(tmp_path: Path) -> None:
    """With a slot for two experts of eight, every token reads some; windows begin at any distance from a page."""
    path = write_model(tmp_path, "qwen3_moe", num_hidden_layers=2, intermediate_size=512).path
    store = Store.open(ensure_view(path, str(path)))
    windows = [store.record(layer, expert).windows for layer in range(2) for expert in range(4)]
    assert {window.skew for each in windows for window in each} - {0}
    with load(path, context=64) as model:
        expected = answer(model)
        model.engine.hierarchy.resize("ram", 2)
        before = model.engine.hierarchy.counters.disk_bytes
        assert answer(model) == expected
        assert model.engine.hierarchy.counters.disk_bytes > before + 10 * store.layers[0].record_bytes


def test_a_store_of_the_same_bits(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen2_moe", tensors_per_file=4).path
    store = quantize(path, tmp_path / "store")
    document = json.loads((store / "store.json").read_text())
    assert (document["version"], document["codec"]) == (3, "gguf")
    assert torch.equal(logits_of(store), logits_of(path))
    assert torch.equal(logits_of(store, exact=True), logits_of(path, exact=True))
    opened, in_place = Store.open(store), Store.open(ensure_view(path, str(path)))
    for piece in opened.pieces():
        piece.check()
    for order in ("rows", "panels"):
        found, expected = opened.read_expert(1, 3, order), in_place.read_expert(1, 3, order)
        assert torch.equal(found, expected[: len(found)])
    with load(store, context=64) as one, load(path, context=64) as other:
        assert answer(one) == answer(other)


@pytest.mark.parametrize("kind", ["Q4_0", "MXFP4", "Q3_K", "Q6_K", "F16"])
def test_groups_of_rows_make_the_whole_record(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices in rows, in panels with and without bytes behind them, and with rows that change places."""
    monkeypatch.setattr(convert_gguf, "RUN_BYTES", 5000)
    path = write_model(tmp_path, "mixtral", kind, {"none": ""}).path
    store, view = Store.open(quantize(path, tmp_path / "store")), Store.open(ensure_view(path, str(path)))
    kept = [name for name, entry in store.dense.items() if entry.quantized]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= {*kept}
    for name in kept:
        assert torch.equal(store.read_dense(name), view.read_dense(name)), name


def test_other_codecs_quantize_anew(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen3_moe").path
    store = quantize(path, tmp_path / "store", codec="int8", dense_codec="int8")
    assert Store.open(store).codec == "int8"
    assert errors_of(logits_of(store), logits_of(path)).median() < 2 * ROUNDED
    with pytest.raises(ConfigError, match="Leave --dense-codec int8 out"):
        quantize(path, tmp_path / "other", dense_codec="int8")


def test_tied_embeddings(tmp_path: Path) -> None:
    written = write_model(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    with torch.no_grad():
        expected = written.hf(IDS).logits
    assert errors_of(logits_of(written.path, exact=True), expected).max() < 1e-5
    assert errors_of(logits_of(written.path), expected).median() < ROUNDED


def test_a_card_that_is_not_used_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(unused_card, "find_nvidia", lambda: Nvidia(driver="580.1", name="RTX 3060"))
    path = write_model(tmp_path, "qwen3_moe").path
    reason = r"No card computes model.embed_tokens.weight in Q5_K"
    with (
        pytest.warns(UserWarning, match=rf"RTX 3060 is not used. {reason}: `offload-moe quantize"),
        load(path) as model,
    ):
        assert not any("driver" in notice for notice in model.notices)
    with pytest.raises(ConfigError, match=rf"{reason}.* Leave --device cuda out"):
        load(path, device="cuda")
    path = write_model(tmp_path / "Q8_0", "qwen3_moe", "Q8_0", {"none": ""}).path
    with pytest.warns(UserWarning, match="RTX 3060 is not used. GGUF files .* unless a device is named"), load(path):
        pass
    path = write_model(tmp_path / "gate", "qwen3_moe", "Q8_0", {"ffn_gate_exps": "Q4_K"}).path
    with pytest.raises(ConfigError, match="No card computes experts in gguf:Q4_K,Q8_0,Q8_0, whose gate and up"):
        load(path, device="cuda")


def test_a_conversation(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    with load(path) as model:
        assert model.tokenizer.chat_template == TEMPLATE
        assert model.tokenizer("the <|im_end|>").input_ids[-1] == model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        session = model.chat()
        assert [*session.send("Hello", temperature=0, max_new_tokens=4)]
        assert session.messages[-1]["role"] == "assistant"


def test_types_that_have_no_kernel_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe", "Q8_0", {"ffn_gate_exps": "IQ2_XXS"}).path
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate_exps\.weight is IQ2_XXS, which is not computed"):
        load(path)
    path = write_model(tmp_path / "narrow", "qwen3_moe", "Q8_0", {"none": ""}, moe_intermediate_size=96).path
    with pytest.raises(CheckpointError, match=r"ffn_down_exps\.weight has rows of 96 weights in Q8_0"):
        load(path)


def test_a_file_that_was_replaced_gets_a_folder_of_its_own(tmp_path: Path, cache: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    view = ensure_view(path, str(path))
    content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is gone, or not the file any more that"):
        Store.open(view)
    assert ensure_view(path, str(path)) != view
    path.unlink()
    with pytest.raises(StoreError, match=r"model\.gguf is gone"):
        Store.open(view)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, r"named 'unheard-of' \(tokenizer\.ggml\.pre\)"),
        ({"tokenizer.chat_template": 1}, r"tokenizer\.chat_template is 1, which is no text"),
        ({"qwen3moe.expert_count": None}, r"no usable qwen3moe\.expert_count: None"),
        ({"qwen3moe.block_count": "two"}, r"no usable qwen3moe\.block_count: 'two'"),
        ({"qwen3moe.rope.scaling.type": "longrope"}, "rotary scaling of type 'longrope' is not supported"),
    ],
)
def test_metadata_that_is_not_usable(metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe", metadata=metadata).path
    with pytest.raises(CheckpointError, match=match):
        load(path)


def test_an_architecture_that_is_not_used_as_it_lies(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe", metadata={"general.architecture": "grok"}).path
    with pytest.raises(CheckpointError, match=r"architecture 'grok'; llama, .* can be used as they lie"):
        load(path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    content = path.read_bytes()
    for size in (0, 10, 3000, len(content) - 5000):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            load(path)


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    expected = logits_of(path)
    shutil.copy(path, tmp_path / "another.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(logits_of(path), expected)


def test_a_file_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "repository", "qwen3_moe").path
    expected = logits_of(path)
    path.rename(path.with_name("tiny-Q4_K_M.gguf"))
    (path.parent / "tiny-Q8_0.gguf").write_bytes(b"another")
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch) as hub:
        assert torch.equal(logits_of("org/tiny:q4_k_m"), expected)
        assert "tiny-Q8_0.gguf" not in hub.sent
        sent = hub.sent["tiny-Q4_K_M.gguf"]
        store = quantize("org/tiny:Q4_K_M", tmp_path / "store")
        assert hub.sent["tiny-Q4_K_M.gguf"] == sent
        with pytest.raises(CheckpointError, match=r"no model in GGUF named Q5_K_M: tiny-Q4_K_M\.gguf, tiny-Q8_0"):
            load("org/tiny:Q5_K_M")
    assert torch.equal(logits_of(store), expected)


def test_a_plan(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3_moe").path
    plan = make_plan(path, Machine(ram_bytes=4 << 30))
    assert plan.settings.codec == "gguf"
    assert plan.placement.ram.num_slots == 8
    assert plan.placement.ram.slot_bytes == Store.open(ensure_view(path, str(path))).layers[0].record_bytes
    with load(path) as model:
        assert model.placement.ram.slot_bytes == plan.placement.ram.slot_bytes


def test_a_plan_for_a_card(tmp_path: Path) -> None:
    """The CPU computes a file unless a card is named, which then takes the device pass, or lacks a kernel by name."""
    kinds = {"token_embd": "Q8_0"}
    path, other = (write_model(tmp_path / kind, "qwen3_moe", kind, kinds).path for kind in ("Q4_K", "Q5_0"))
    machine = Machine(vram_bytes=4 << 30, ram_bytes=4 << 30)
    assert make_plan(path, machine).placement.vram is None
    plan = make_plan(path, machine, names_card=True)
    assert plan.placement.vram is not None
    assert plan.placement.vram.slot_bytes == plan.placement.ram.slot_bytes
    assert plan.why_no_device_pass == ""
    with pytest.raises(ConfigError, match=r"^No card computes experts in .*Q5_0.* Leave --gpu and --vram out"):
        make_plan(other, machine, names_card=True)
    assert make_plan(other, machine).fits
