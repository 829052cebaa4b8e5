"""Parameter counts, from the configs of the real models alone."""

import time
from pathlib import Path

import pytest
from transformers import AutoConfig

from offload_moe.errors import UnsupportedModelError
from offload_moe.plan.parameters import describe_model
from offload_moe.plan.sizes import fp16_bytes
from offload_moe.plan.source import open_source
from tests.support.plan import CONFIGS, real_shape, tiny_shape
from tests.support.tiny_models import COMMON, FAMILIES, tiny_model


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral-8x7B-v0.1", 46.70, 12.88),
        ("DeepSeek-V3", 671.03, 37.55),
        ("Qwen3-235B-A22B", 235.09, 22.19),
        ("Kimi-K2-Instruct", 1026.41, 32.86),
        ("DeepSeek-V2", 235.74, 21.38),
        ("gpt-oss-120b", 116.83, 5.71),
        ("granite-3.0-1b-a400m", 1.33, 0.43),
    ],
)
def test_published_counts(name: str, total: float, active: float) -> None:
    shape = real_shape(name)
    assert round(shape.total_parameters / 1e9, 2) == total
    assert round(shape.active_parameters / 1e9, 2) == active
    assert fp16_bytes(shape.total_parameters) == 2 * shape.total_parameters


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("DeepSeek-V4-Flash", 284.33, 13.80), ("GLM-5", 743.91, 41.78), ("Qwen3.5-35B-A3B", 34.66, 3.45)],
)
def test_newer_configs_are_planned(name: str, total: float, active: float) -> None:
    """What transformers builds; no card confirms these counts, so a change of them is what this would notice."""
    shape = real_shape(name)
    assert (round(shape.total_parameters / 1e9, 2), round(shape.active_parameters / 1e9, 2)) == (total, active)


@pytest.mark.parametrize("name", ["Kimi-K3", "GRIN-MoE"])
def test_configs_that_need_code_of_their_own_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not in transformers .* never run"):
        open_source(CONFIGS / f"{name}.json")


def test_mixtral_to_the_last_parameter() -> None:
    vocabulary, hidden, intermediate, layers = 32000, 4096, 14336, 32
    expert = 3 * hidden * intermediate
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    dense = 2 * vocabulary * hidden + hidden + layers * (attention + 2 * hidden + 8 * hidden)
    shape = real_shape("Mixtral-8x7B-v0.1")
    assert shape.total_parameters == dense + layers * 8 * expert == 46_702_792_704
    assert shape.active_parameters == dense + layers * 2 * expert == 12_879_925_248
    assert shape.dense_parameters == dense
    assert (shape.num_experts, shape.top_k, shape.hidden_size, shape.max_context) == (256, 2, hidden, 32768)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_real_model(family: str) -> None:
    assert tiny_shape(family).total_parameters == sum(p.numel() for p in tiny_model(family).parameters())


def test_a_tied_head_is_counted_once() -> None:
    apart, tied = tiny_shape("qwen3_moe"), tiny_shape("qwen3_moe", tie_word_embeddings=True)
    table = 128 * 64
    assert apart.total_parameters - tied.total_parameters == table
    assert (apart.lookup_elements, tied.lookup_elements) == (table, 0)


def test_buffers_are_stored_but_are_no_parameters() -> None:
    shape = tiny_shape("deepseek_v3")
    (bias, _) = [weight for weight in shape.dense if "e_score_correction_bias" in weight.name]
    assert not bias.is_parameter


def test_the_largest_skeletons_are_quick() -> None:
    config = open_source(CONFIGS / "DeepSeek-V3.json").config
    real_shape("DeepSeek-V3")  # the module of the family is imported once
    begin = time.process_time()
    describe_model(config)
    assert time.process_time() - begin < 3


def test_a_config_without_a_dtype_is_in_bf16() -> None:
    assert open_source(CONFIGS / "gpt-oss-120b.json").config.dtype is None
    assert {str(weight.dtype) for weight in real_shape("gpt-oss-120b").dense} == {"torch.bfloat16"}


def test_dense_models_are_refused() -> None:
    config = AutoConfig.for_model("qwen3", **COMMON)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        describe_model(config)


def test_a_model_without_a_transformers_architecture_is_refused_by_the_name_of_its_file() -> None:
    path: Path = CONFIGS / "GRIN-MoE.json"
    with pytest.raises(UnsupportedModelError, match=rf"^{path}: model type 'grinmoe' is not in transformers"):
        open_source(path)


@pytest.mark.parametrize(
    ("family", "top_k"), [("switch_transformers", 1), ("nllb-moe", 2), ("dbrx", 3), ("longcat_flash", 5), ("jetmoe", 2)]
)
def test_families_outside_the_registry_say_their_top_k_elsewhere(family: str, top_k: int) -> None:
    changes: dict[str, object] = {
        "dbrx": {
            "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 3},
        },
        "longcat_flash": {"moe_topk": 5, "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 32},
        "jetmoe": {"num_experts_per_tok": 2},
    }.get(family, {})
    sizes = {"d_model": 64, "d_ff": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    assert describe_model(AutoConfig.for_model(family, **sizes, **changes)).top_k == top_k
