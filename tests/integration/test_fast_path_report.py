"""What `load`, `doctor` and `models` say of the fast path is what a decode step does."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.checkpoints import FOUR_LAYERS, write_checkpoint

from offload_moe import load, quantize
from offload_moe.checkpoint.catalog import families
from offload_moe.decode.forward import DecoderForward
from offload_moe.decode.layer import NativeLayer
from offload_moe.decode.span import LayerSpan
from offload_moe.doctor.fast_path import check_fast_path
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.store import Store

CHUNKED = "queries scaled by their position and chunks"
SIZES: dict[str, Any] = {"head_dim": 16, "hidden_size": 64}  # that the kernels take


def quantized(folder: Path, family: str, **changes: object) -> Path:
    write_checkpoint(folder / "checkpoint", family, **SIZES | changes)
    quantize(folder / "checkpoint", folder / "store")
    return folder / "store"


def kinds(model: Model) -> list[str]:
    assert model.fast_path is not None
    return [layer.kind for layer in model.fast_path.layers]


def kinds_in_place(model: Model) -> list[str]:
    """As the report should have it, from the plan in place."""
    decoder = model.hf.get_decoder()
    if not isinstance(decoder.forward, DecoderForward):
        return ["modules"] * len(decoder.layers)
    found: list[str] = []
    for stage in decoder.forward.plan.stages:
        if isinstance(stage, LayerSpan):
            found += ["span"] * len(stage.layers)
        else:
            found.append("layer" if isinstance(stage, NativeLayer) else "modules")
    return found


@pytest.mark.parametrize(
    ("family", "changes", "expected", "column", "reason"),
    [
        ("mixtral", {}, ["span"] * 3, "yes", ""),
        ("gpt_oss", {}, ["span"] * 3, "yes", ""),
        ("granitemoe", {"residual_multiplier": 0.5}, ["span"] * 3, "yes", ""),
        ("olmoe", {"clip_qkv": 4.0}, ["modules"] * 3, "yes", "clamped queries, keys and values"),
        ("minimax_m2", {}, ["span"] * 3, "yes", ""),
        ("qwen3_next", FOUR_LAYERS, ["span"] * 4, "yes", ""),
        ("qwen3_5_moe_text", FOUR_LAYERS, ["span"] * 4, "yes", ""),
        ("phimoe", {"attention_bias": True, "lm_head_bias": True}, ["span"] * 3, "yes", ""),
        ("minimax_m2", {"rotary_dim": 8}, ["span"] * 3, "yes", ""),
        ("glm4_moe", {}, ["span"] * 3, "yes", ""),
        ("ernie4_5_moe", {"moe_layer_start_index": 0}, ["span"] * 3, "yes", ""),
        ("hunyuan_v1_moe", {}, ["span"] * 3, "yes", ""),
        ("llama4_text", {}, ["span"] * 3, "yes", ""),
        (
            "llama4_text",
            {"layer_types": ["chunked_attention"] * 3, "no_rope_layers": [0] * 3},
            ["modules"] * 3,
            "yes",
            CHUNKED,
        ),
        ("flex_olmo", {}, ["modules"] * 3, "no", "norms after attention and MLP"),
    ],
)
def test_every_place_says_the_same_of_a_declared_family(
    family: str, changes: dict[str, Any], expected: list[str], column: str, reason: str, tmp_path: Path
) -> None:
    store = quantized(tmp_path, family, **changes)
    with load(store) as model:
        assert kinds(model) == kinds_in_place(model) == expected
        notices = [notice for notice in model.notices if "slow path" in notice]
    examined = check_fast_path(Store.open(store))
    assert examined.verdict == "ok"
    if reason:
        assert len(notices) == 1
        assert reason in notices[0]
        assert reason in examined.found
        assert "0 of 3 layers" in examined.found
    else:
        assert not notices
        assert examined.found == f"{len(expected)} of {len(expected)} layers decode natively on the CPU"
    assert {entry.name: entry.fast_path for entry in families()}[family.removesuffix("_text")] == column


def test_a_layer_that_is_not_declared_is_reported_as_found(tmp_path: Path) -> None:
    store = quantized(tmp_path, "kolibri1")
    with load(store) as model:
        assert kinds(model) == kinds_in_place(model) == ["modules"] * 3
        assert "a class that is not declared (Kolibri1DecoderLayer)" in str(model.fast_path)
    assert "Kolibri1DecoderLayer" in check_fast_path(Store.open(store)).found


def test_sizes_that_no_kernel_takes_are_a_reason(tmp_path: Path) -> None:
    store = quantized(tmp_path, "mixtral", head_dim=8)
    with load(store) as model:
        assert kinds(model) == ["modules"] * 3
        assert "heads of 8" in str(model.fast_path)


@pytest.mark.parametrize(("family", "dense_codec"), [("qwen2_moe", "int8"), ("gpt_oss", "int8"), ("gpt_oss", "nf4")])
def test_biases_in_a_record_decode_natively(family: str, dense_codec: Literal["int8", "nf4"], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, **SIZES)
    quantize(tmp_path / "checkpoint", tmp_path / "store", dense_codec=dense_codec)
    ids = torch.arange(1, 10).view(1, -1)
    logits = []
    for fast_path in (True, False):
        with load(tmp_path / "store", fast_path=fast_path) as model, torch.inference_mode():
            assert not fast_path or kinds(model) == ["span"] * 3
            cache = cache_from(model.hf(input_ids=ids, use_cache=True))
            logits.append(model.hf(input_ids=torch.tensor([[5]]), **with_cache(cache)).logits)
            linear = model.hf.model.layers[0].self_attn.q_proj
            assert linear.shape.biases
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()


def test_a_check_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = quantized(tmp_path, "mixtral")
    monkeypatch.setattr("offload_moe.decode.layer.agree", lambda *_, **__: False)
    with load(store) as model:
        assert kinds(model) == ["modules"] * 3
        assert "other numbers than the layer on probes" in str(model.fast_path)


def test_numbers_that_are_kept_take_the_slow_path_without_a_notice(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "mixtral", **SIZES)
    quantize(tmp_path / "checkpoint", tmp_path / "store", codec="bf16")
    with load(tmp_path / "store") as model:
        assert "kept bit for bit" in str(model.fast_path)
        assert not [notice for notice in model.notices if "slow path" in notice]
    with load(tmp_path / "store", fast_path=False) as model:
        assert model.fast_path is None
