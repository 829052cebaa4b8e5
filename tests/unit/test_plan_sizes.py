"""Bytes: against numbers worked out by hand, and against real records, stores and caches."""

from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from offload_moe.checkpoint.experts import find_experts
from offload_moe.convert.quantize import quantize
from offload_moe.decode.cache import give_room
from offload_moe.engine.assemble import assemble
from offload_moe.families.cache_name import with_cache
from offload_moe.plan.budget import DEVICE_PROMPT_TOKENS
from offload_moe.plan.machine import Machine
from offload_moe.plan.outlook import look_ahead
from offload_moe.plan.parameters import describe_model
from offload_moe.plan.sizes import (
    checkpoint_estimate,
    dense_memory_bytes,
    dense_store_bytes,
    experts_bytes,
    routed_bytes,
    slot_bytes,
    store_bytes,
    store_bytes_per_codec,
)
from offload_moe.plan.source import open_source
from offload_moe.plan.working import activation_bytes, cache_bytes, tile_bytes
from offload_moe.quant import CODECS, get_codec
from offload_moe.store import Store
from tests.support.plan import CONFIGS, GIB, real_shape, task, tiny_shape
from tests.support.tiny_models import COMMON, FAMILIES, tiny_model

LINEAR_ATTENTION = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
INDEXED = FAMILIES["deepseek_v3"] | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}


def test_a_tiny_mixtral_by_hand() -> None:
    shape = tiny_shape("mixtral")  # hidden 64, intermediate 96, 3 layers of 6 experts, top-2, 2 KV heads of 16
    # gate_up [192, 64]: 6144 of codes, 192 absmax to 6400, one scale to 6656, the offset to 6912; down [64, 128 with
    # its padding]: 4096 of codes, 128 absmax to 11264, a scale to 11520, the offset at 11524; in all 3 x 4096.
    assert slot_bytes(shape, "nf4") == 12288
    assert experts_bytes(shape, "nf4") == 3 * 6 * 12288
    assert routed_bytes(shape, "nf4") == 3 * 2 * 12288
    assert slot_bytes(shape, "bf16") == 9 * 4096  # 3 * 64 * 96 * 2 bytes
    # Embeddings and head 8192 each, three times attention 12288, norms 128 and router 384, last norm 64: in bf16.
    assert dense_store_bytes(shape, "bf16") == 2 * (16384 + 64 + 3 * 12800)
    assert dense_memory_bytes(shape, "bf16", torch.bfloat16) == 2 * (16384 + 64 + 3 * 12800)
    # As int8 records: head 8192 + 512 to 12288; q and o 4096 + 256 to 8192 each; k and v 2048 + 128 to 4096 each.
    # Quantized while they load they are not padded.
    records, others = 12288 + 3 * (2 * 8192 + 2 * 4096), 4 * (8192 + 64 + 3 * (128 + 384))
    now = 8192 + 512 + 3 * (2 * (4096 + 256) + 2 * (2048 + 128))
    assert dense_memory_bytes(shape, "int8", torch.float32, stored="int8") == records + others
    assert dense_memory_bytes(shape, "int8", torch.float32) == now + others
    assert cache_bytes(shape, 10, torch.float32) == 3 * 10 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", CODECS)
def test_slots_are_as_long_as_real_records(family: str, codec: str) -> None:
    layer = find_experts(tiny_model(family))[0]
    tensors = {name: getattr(layer.module, name).data[0] for name in layer.shape.module_shapes()}
    assert slot_bytes(tiny_shape(family), codec) == get_codec(codec).encode(layer.shape, tensors).numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dense_codec", ["bf16", "nf4"])
def test_store_sizes_are_those_of_a_written_store(tmp_path: Path, family: str, dense_codec: str) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    store = Store.open(quantize(tmp_path / "model", tmp_path / "store", dense_codec=dense_codec))
    shape = describe_model(open_source(tmp_path / "model").config)
    assert experts_bytes(shape, "nf4") == store.experts_bytes
    assert dense_store_bytes(shape, dense_codec) == store.dense_bytes
    assert store_bytes_per_codec(shape, dense_codec, ["nf4"])["nf4"] == store.experts_bytes + store.dense_bytes
    files = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    assert store_bytes(shape, "nf4", dense_codec) < files < store_bytes(shape, "nf4", dense_codec) + 65536


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_dense_bytes_are_those_of_a_real_model(family: str) -> None:
    model = tiny_model(family)
    routed = {name for layer in find_experts(model) for name in layer.parameter_names()}
    loaded = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in routed)
    assert dense_memory_bytes(tiny_shape(family), "bf16", torch.float32) == loaded


def test_weights_that_stay_in_fp32_count_as_such(tmp_path: Path) -> None:
    """A correction of scores, and from transformers 5.24 on a router's weight."""
    tiny_model("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    store = Store.open(quantize(tmp_path / "model", tmp_path / "store"))
    shape = describe_model(open_source(tmp_path / "model").config)
    weights = assemble(store, torch.device("cpu"), torch.bfloat16).hf.state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16, torch.float32}
    assert dense_memory_bytes(shape, "bf16", torch.bfloat16) == sum(weight.nbytes for weight in weights)


def cached_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of a real cache: a prompt of all tokens but one, and one decoded token."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(3, 3 + context)[None]
    with torch.inference_mode():
        model(ids[:, :-1], **with_cache(cache))
        model(ids[:, -1:], **with_cache(cache))
    total = 0
    for layer in cache.layers:
        held = vars(layer).values()
        tensors = [t for value in held for t in (value.values() if isinstance(value, dict) else [value])]
        total += sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1)
    return total


@pytest.mark.parametrize("context", [12, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_a_real_one(family: str, context: int) -> None:
    assert cache_bytes(tiny_shape(family), context, torch.float32) == cached_bytes(tiny_model(family), context)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("qwen3_next", LINEAR_ATTENTION), ("deepseek_v2", LATENT), ("deepseek_v32", INDEXED)],
    ids=["linear", "latent", "indexed"],
)
def test_the_cache_of_other_kinds_of_attention(family: str, fields: dict[str, object]) -> None:
    model = model_of(family, fields)
    assert cache_bytes(describe_model(model.config), 20, torch.float32) == cached_bytes(model, 20)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen3_next"])
def test_a_cache_in_bf16_is_as_large_as_a_real_one(family: str) -> None:
    fields = {"deepseek_v2": LATENT, "qwen3_next": LINEAR_ATTENTION}.get(family)
    model = tiny_model(family) if fields is None else model_of(family, fields)
    cache = DynamicCache(config=model.config)
    give_room(cache, kept=torch.bfloat16)
    with torch.inference_mode():
        model(torch.arange(3, 43)[None], **with_cache(cache))
    names = [(layer, name) for layer in cache.layers for name in {*vars(layer), "keys", "values"} if name[0] != "_"]
    held = [getattr(layer, name, None) for layer, name in names]
    tensors = [part for value in held for part in (value.values() if isinstance(value, dict) else [value])]
    total = sum(part.nbytes for part in tensors if isinstance(part, torch.Tensor) and part.numel() > 1)
    narrow = cache_bytes(describe_model(model.config), 40, torch.float32, kept=torch.bfloat16)
    assert narrow == total
    assert total < 0.8 * cache_bytes(describe_model(model.config), 40, torch.float32)


def model_of(family: str, fields: dict[str, object]) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(COMMON | fields))
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    return cast(PreTrainedModel, made.eval())


def test_states_of_unknown_size_are_owned_up_to() -> None:
    config = AutoConfig.for_model("jamba", **(COMMON | {"num_hidden_layers": 8, "num_experts": 4}))
    planned = task(describe_model(config), Machine(ram_bytes=GIB), context=64)
    assert [part.detail for part in look_ahead(planned).placement.ram.fixed if "cache" in part.name] == [
        "64 tokens, without recurrent states"
    ]


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("DeepSeek-V3", 61 * 576), ("Mixtral-8x7B-v0.1", 32 * 2 * 8 * 128), ("Qwen3-235B-A22B", 94 * 2 * 4 * 128)],
)
def test_cache_of_the_real_models(name: str, per_token: int) -> None:
    shape = real_shape(name)
    assert cache_bytes(shape, 1000, torch.bfloat16) == 1000 * per_token * 2


def test_windows_end_the_growth_of_half_the_layers() -> None:
    shape = real_shape("gpt-oss-120b")
    assert cache_bytes(shape, 8192, torch.bfloat16) == 2 * 1024 * 18 * (128 + 8192)


def test_activations_by_hand() -> None:
    shape = tiny_shape("mixtral")
    # Attention: q 64, k 32, v 32, o 64 per token; q and o's input, 64 each, expanded over the context.
    # Experts: outputs of a top-2, and inputs and 3 x 96 of one expert. The experts are wider.
    assert activation_bytes(shape, 10, torch.float32) == 10 * (4 * 64 + (2 + 1) * 64 + 3 * 96) * 4
    long = 100 * DEVICE_PROMPT_TOKENS
    attention = DEVICE_PROMPT_TOKENS * (64 + 32 + 32 + 64) + long * 128
    assert activation_bytes(shape, long, torch.bfloat16) == (DEVICE_PROMPT_TOKENS * 4 * 64 + attention) * 2


def test_tiles_are_what_is_decoded_at_once() -> None:
    shape = tiny_shape("mixtral")

    def tiles(codec: str, dense_codec: str, *, has_device: bool) -> int:
        dtype = torch.bfloat16 if has_device else torch.float32
        return tile_bytes(shape, codec, dense_codec, dtype, has_device=has_device)

    assert tiles("nf4", "nf4", has_device=False) == 0
    assert tiles("bf16", "bf16", has_device=True) == 0
    assert tiles("bf16", "bf16", has_device=False) == 3 * 64 * 96 * 4
    assert tiles("nf4", "bf16", has_device=True) == 192 * 64 * 2
    assert tiles("int8", "bf16", has_device=True) == 3 * 64 * 96 * 6
    assert tiles("bf16", "int8", has_device=True) == 128 * 64 * 6  # the head


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("Mixtral-8x7B-v0.1", 2 * 46_702_792_704),
        ("gpt-oss-120b", 60.8 * 2**30),  # its model card
        ("DeepSeek-V3", 671e9),  # fp8
    ],
)
def test_checkpoints_that_no_file_weighs_are_estimated(name: str, num_bytes: float) -> None:
    config = open_source(CONFIGS / f"{name}.json").config
    assert checkpoint_estimate(real_shape(name), config) == pytest.approx(num_bytes, rel=0.01)
