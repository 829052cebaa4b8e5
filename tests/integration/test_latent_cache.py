"""DeepSeek and Kimi cache the latent of each token, never the keys and values of every head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import DEEPSEEK, write_checkpoint
from torch import Tensor
from transformers import DynamicCache

from offload_moe import load
from offload_moe.families.cache_name import with_cache

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_LAYERS, NUM_TOKENS, NUM_DECODED, BATCH = 3, 9, 4, 2
WIDTH = DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"]
ALL_HEADS = 4 * (DEEPSEEK["qk_nope_head_dim"] + DEEPSEEK["qk_rope_head_dim"] + DEEPSEEK["v_head_dim"])


def checkpoint_of(folder: Path, family: str) -> Path:
    """Kimi K2 is DeepSeek-V3 under a model type of its own."""
    write_checkpoint(folder, "deepseek_v3" if family == "kimi_k2" else family)
    if family == "kimi_k2":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": {"x": "y.z"}}))
    return folder


@torch.inference_mode()
def filled_cache(hf: Any) -> DynamicCache:
    cache = DynamicCache(config=hf.config)
    ids = torch.randint(3, 60, (BATCH, NUM_TOKENS))
    for _ in range(1 + NUM_DECODED):
        out = hf(input_ids=ids, **with_cache(cache), use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
    return cache


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_bytes_per_token_are_the_latent_and_the_rotated_key(
    family: str, fast_path: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    with load(checkpoint_of(tmp_path / "checkpoint", family), codec="int8", dtype=dtype, fast_path=fast_path) as model:
        cache = filled_cache(model.hf)
    tokens = BATCH * (NUM_TOKENS + NUM_DECODED)
    found = sum(num_bytes(layer.keys, layer.values) for layer in cache.layers)
    kept = torch.bfloat16
    assert found == tokens * WIDTH * kept.itemsize * NUM_LAYERS
    assert found < tokens * ALL_HEADS * kept.itemsize * NUM_LAYERS
    rooms = [room for layer in cache.layers if (room := getattr(layer, "_room", None)) is not None]
    assert len(rooms) == (NUM_LAYERS if fast_path or dtype == torch.float32 else 0)
    for room in rooms:  # room to grow is as narrow
        assert num_bytes(*room) == room[0].shape[0] * room[0].shape[2] * WIDTH * kept.itemsize
