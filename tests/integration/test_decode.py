"""The fast path against transformers' own code: prompts and decode steps, padded batches, all grades."""

from pathlib import Path

import pytest
import torch
from support.products import products_of_operands_alone
from support.tiny_models import FAMILIES, tiny_model, tiny_prompt
from torch import Tensor

from offload_moe import load
from offload_moe.decode.attention import DecodeAttention
from offload_moe.decode.cache import RoomyLayer
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.mlp import FusedMLP
from offload_moe.decode.norm import FusedRMSNorm
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import cache_from, with_cache

SHARED = {
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
        "qkv_bias": True,
        "tie_word_embeddings": True,
    }
}
ALL = sorted({*FAMILIES, *SHARED})
STEPS = 6
ROUNDING = 1e-4  # fp32, another order of additions; absorbed attention
# Rounding of an activation to int8 elsewhere by one step; see the decision on the fast path.
INT8_ROUNDING = 5e-2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny checkpoint per family, in bf16, and a cache for its stores."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in ALL:
        tiny_model(family, **SHARED.get(family, {})).to(torch.bfloat16).save_pretrained(root / family)
    return {family: root / family for family in ALL}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@torch.inference_mode()
@products_of_operands_alone()
def logits_of(model: Model, batch: int) -> Tensor:
    """Logits of a prompt's last token and of decode steps with given tokens, ``[batch, 1 + STEPS, V]``."""
    ids, mask = tiny_prompt(batch, 9)
    out = model.hf(input_ids=ids, attention_mask=mask, use_cache=True)
    logits = [out.logits[:, -1:]]
    for step in range(STEPS):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        tokens = torch.full((batch, 1), 5 + step)
        positions = mask.sum(dim=1, keepdim=True) - 1
        out = model.hf(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            **with_cache(cache_from(out)),
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ALL)
def test_a_lossless_model_keeps_its_bits(family: str, checkpoints: dict[str, Path]) -> None:
    with (
        load(checkpoints[family], codec="bf16", fast_path=False) as plain,
        load(checkpoints[family], codec="bf16") as fast_path,
    ):
        assert not counts(plain.hf)
        assert counts(fast_path.hf)["FusedRMSNorm"]
        for batch in (1, 3):
            expected = logits_of(plain, batch)
            assert expected.abs().max() > 0.1
            assert torch.equal(logits_of(fast_path, batch), expected)


@pytest.mark.parametrize("family", ALL)
def test_a_quantized_model_stays_within_rounding(family: str, checkpoints: dict[str, Path]) -> None:
    with load(checkpoints[family], fast_path=False) as plain, load(checkpoints[family]) as fast_path:
        for batch in (1, 3):
            assert distance(logits_of(fast_path, batch), logits_of(plain, batch)) < INT8_ROUNDING


@pytest.mark.parametrize("family", ALL)
def test_an_exact_model_stays_within_rounding(family: str, checkpoints: dict[str, Path]) -> None:
    with (
        load(checkpoints[family], dense_codec="int8", exact=True, fast_path=False) as plain,
        load(checkpoints[family], dense_codec="int8", exact=True) as fast_path,
    ):
        for batch in (1, 3):
            assert distance(logits_of(fast_path, batch), logits_of(plain, batch)) < ROUNDING


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", {"DecodeAttention": 3, "FusedRMSNorm": 7}),
        ("qwen3_moe", {"DecodeAttention": 3, "FusedRMSNorm": 13}),
        ("gpt_oss", {"DecodeAttention": 3, "FusedRMSNorm": 7}),
        ("qwen2_moe", {"DecodeAttention": 3, "FusedRMSNorm": 7, "FusedMLP": 3}),
        ("deepseek_v3", {"FusedRMSNorm": 13, "FusedMLP": 3}),
    ],
)
def test_every_family_gets_what_fits_it(family: str, expected: dict[str, int], checkpoints: dict[str, Path]) -> None:
    with load(checkpoints[family]) as model:
        assert counts(model.hf) == expected


def counts(hf: torch.nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in hf.modules():
        for part in (module, vars(module).get("forward")):
            if isinstance(part, DecodeAttention | FusedRMSNorm | FusedMLP):
                found[type(part).__name__] = found.get(type(part).__name__, 0) + 1
    return found


def test_generate_fills_a_cache_with_room(checkpoints: dict[str, Path]) -> None:
    ids, mask = tiny_prompt(3, 9)
    with load(checkpoints["mixtral"]) as fast_path, load(checkpoints["mixtral"], fast_path=False) as plain:
        results = [
            model.hf.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                disable_compile=True,
                return_dict_in_generate=True,
            )
            for model in (fast_path, plain)
        ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(type(layer) is RoomyLayer for layer in cache_from(results[0]).layers)


@pytest.mark.parametrize("dense_codec", [None, "bf16", "nf4"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_the_plan_knows_what_dense_weights_will_take(
    family: str, dense_codec: str | None, checkpoints: dict[str, Path]
) -> None:
    with load(checkpoints[family], dense_codec=dense_codec) as model:
        assert model.placement.dense_codec == (dense_codec or "int8")
        (planned,) = [part.num_bytes for part in model.placement.ram.fixed if part.name == "dense weights"]
        assert planned == pytest.approx(model.memory["dense weights"], rel=0.05)


def test_dense_weights_stay_in_bf16_where_that_was_asked_for(checkpoints: dict[str, Path]) -> None:
    for settings, num_linears in ({"exact": True}, 0), ({"dense_codec": "bf16"}, 0), ({"codec": "bf16"}, 0), ({}, 13):
        with load(checkpoints["mixtral"], **settings) as model:
            assert sum(isinstance(module, QuantLinear) for module in model.hf.modules()) == num_linears


def test_a_tied_head_is_a_quantized_copy(checkpoints: dict[str, Path]) -> None:
    with load(checkpoints["qwen2_moe"]) as model:
        embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
        assert isinstance(head, QuantLinear)
        assert embedding.weight.dtype == torch.bfloat16  # widened when looked up
        decoded = head.codec.decode(head.shape, head.in_rows(), torch.float32)["weight"]
        assert 0 < distance(decoded, embedding.weight) < 0.01


@pytest.mark.parametrize("part", ["self_attn", "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp"])
def test_a_hook_on_a_part_of_a_layer_sees_every_step(part: str, checkpoints: dict[str, Path]) -> None:
    with load(checkpoints["qwen3_moe"], dense_codec="int8") as model:
        expected = logits_of(model, 1)
        calls: list[int] = []
        module = model.hf.model.layers[0].get_submodule(part)
        handle = module.register_forward_hook(lambda module, args, out: calls.append(1))
        watched = logits_of(model, 1)
        handle.remove()
        assert len(calls) == 1 + STEPS
        assert distance(watched, expected) < INT8_ROUNDING
        assert torch.equal(logits_of(model, 1), expected)
        assert len(calls) == 1 + STEPS
