"""A decode step has the same bits with every kernel set, and for every number of threads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.kernels import PANEL_SETS
from support.native_stores import LLAMA4
from torch import Tensor
from transformers import DynamicCache

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache
from offload_moe.native import kernels

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

NUM_PROMPT, NUM_STEPS = 11, 3
DELTA: dict[str, Any] = {  # of heads that the kernels take
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
SIZES: dict[str, Any] = {"head_dim": 16, "hidden_size": 64}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen2_moe", {}),
    ("gpt_oss", {}),
    ("phimoe", {"router_jitter_noise": 0.2}),
    ("deepseek_v3", {"qk_rope_head_dim": 16}),
    ("qwen3_next", DELTA),
    ("qwen3_5_moe_text", DELTA),
    ("olmoe", {}),
    ("mixtral", {}),
    ("glm4_moe", {}),
    ("minimax_m2", {"rotary_dim": 8}),
    ("granitemoe", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
    ("llama4_text", LLAMA4),
]


@torch.inference_mode()
def logits_of(model: Model) -> Tensor:
    cache = DynamicCache(config=model.hf.config)
    model.hf(torch.arange(3, 3 + NUM_PROMPT)[None], **with_cache(cache))
    return torch.cat([model.hf(torch.tensor([[5 + step]]), **with_cache(cache)).logits for step in range(NUM_STEPS)])


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_a_step_has_the_same_bits_everywhere(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, **SIZES | changes)
    quantize(tmp_path / "checkpoint", tmp_path / "store")
    with load(tmp_path / "store") as model:
        assert model.fast_path is not None
        assert all(layer.kind == "span" for layer in model.fast_path.layers)
        results = []
        try:
            for name in PANEL_SETS:
                kernels.select_instruction_set(name)
                for threads in (1, 2):
                    kernels.set_threads(threads)
                    results.append(logits_of(model))
        finally:
            kernels.set_threads(1)
    assert len(results) >= 2
    assert results[0].abs().max() > 1e-2
    assert all(torch.equal(each.view(torch.int32), results[0].view(torch.int32)) for each in results[1:])


def test_a_step_does_not_depend_on_the_callers_treatment_of_subnormal_numbers(tmp_path: Path) -> None:
    """All residual sums are subnormal, in the caller's thread, in the pool's and in that of a pass."""
    tiny = {"embedding_multiplier": 2e-38, "residual_multiplier": 2e-38, "rms_norm_eps": 1e-30}
    write_checkpoint(tmp_path / "checkpoint", "granitemoe", **SIZES | tiny)
    quantize(tmp_path / "checkpoint", tmp_path / "store")
    with load(tmp_path / "store") as model:
        assert model.fast_path is not None
        assert all(layer.kind == "span" for layer in model.fast_path.layers)
        expected = logits_of(model)
        assert expected.abs().max() > 0
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush")
        try:
            found = logits_of(model)
        finally:
            torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
