"""Models with linear attention by gated delta rules decode natively where the store is quantized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import open_model
from support.tiny_models import tiny_model

from offload_moe.convert.quantize import quantize
from offload_moe.decode.delta import DeltaForward
from offload_moe.decode.dense import QuantLinear
from tests.integration.test_card_pass import logits

HEADS = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}


def num_fused(hf: Any) -> int:
    return sum(isinstance(vars(module).get("forward"), DeltaForward) for module in hf.modules())


def output_projections(hf: Any) -> list[Any]:
    found = [module for name, module in hf.named_modules() if name.endswith("linear_attn.out_proj")]
    assert found
    return found


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_decode_steps_give_the_modules_logits(family: str, tmp_path: Path) -> None:
    tiny_model(family, **HEADS).to(torch.bfloat16).save_pretrained(tmp_path / family)
    store = quantize(tmp_path / family, tmp_path / "store", codec="int8", dense_codec="int8")
    with open_model(store) as fast, open_model(store, fast_path=False) as plain:
        assert num_fused(fast.hf) == 3
        assert num_fused(plain.hf) == 0
        assert all(isinstance(linear, QuantLinear) for linear in output_projections(fast.hf))
        got, expected = logits(fast.hf, 8), logits(plain.hf, 8)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert (got - expected).norm() <= 1e-2 * expected.norm()
        assert len(set(got.argmax(-1).flatten().tolist())) > 2


def test_a_lossless_store_keeps_the_modules_bits(tmp_path: Path) -> None:
    tiny_model("qwen3_next", **HEADS).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    store = quantize(tmp_path / "checkpoint", tmp_path / "store", codec="bf16", dense_codec="bf16")
    with open_model(store) as model:
        assert num_fused(model.hf) == 0
