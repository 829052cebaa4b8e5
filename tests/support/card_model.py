"""Models that decode by the device pass, on the fake driver: torch's memory on the CPU stands for the card's."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.build import install
from offload_moe.card.device import CardDevice
from offload_moe.card.passes import CardPass
from offload_moe.convert.quantize import quantize
from offload_moe.decode import make_fast
from offload_moe.engine.build import Blueprint, Engine, build, pools_of
from offload_moe.memory.page_lock import LockRuntime, PageLock
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.store import Store
from support.cuda import fake
from support.tiny_models import tiny_model, tiny_prompt

NUM_PROMPT, NUM_NEW = 9, 6  # tokens
LINEAR_ATTENTION: dict[str, object] = {  # three layers of gated delta rules, and one of attention with gates
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},  # windows, sinks, biases, the clamped activation
    "qwen2_moe": {  # a shared expert with a gate
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "deepseek_v3": {"qk_rope_head_dim": 16},  # latents, a dense layer, groups, a shared expert
    "glm4_moe": {  # grouped queries, else the same
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "phimoe": {  # layer norms, a sparse mixer, biases
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "llama4_text": {  # chunks, layers without rotation whose queries are scaled, experts whose inputs are
        "head_dim": 16,
        "num_hidden_layers": 5,
        "moe_layers": [1, 2, 4],
        "no_rope_layers": [1, 0, 1, 0, 1],
        "layer_types": [*["chunked_attention", "full_attention"] * 2, "chunked_attention"],
        "attention_chunk_size": 7,
        "floor_scale": 3,
        "attn_scale": 0.7,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 64,
    },
    "hunyuan_v1_moe": {"head_dim": 16},  # norms of heads behind their rotation
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
}


def store_of(family: str, folder: Path) -> Path:
    """Of a tiny model."""
    checkpoint = folder / family
    tiny_model(family, **FAMILIES[family]).to(torch.bfloat16).save_pretrained(checkpoint)
    return quantize(checkpoint, folder / f"{family}-nf4", codec="nf4")


class SessionLocks(LockRuntime):
    """Page locks of the fake driver."""

    def __init__(self, device: CardDevice) -> None:
        self._session = device.session

    def register(self, address: int, num_bytes: int) -> int:
        return self._session.lock(address, num_bytes)

    def unregister(self, address: int) -> None:
        self._session.unlock(address)


@dataclass
class CardModel:
    engine: Engine
    card: CardPass
    driver: fake.FakeDriver

    @property
    def hf(self) -> Any:
        return self.engine.hf


@contextmanager
def card_model(
    path: Path,
    driver: fake.FakeDriver,
    num_ram: int,
    num_vram: int,
    *,
    context: int = 512,
    dense_codec: str | None = "int8",
    slots_per_chunk: int = 1000,
    shim_mode: str = "race",
) -> Iterator[CardModel]:
    """A store with so many slots in RAM and on the card.

    dense_codec: None keeps the store's. shim_mode: of `shim.py`.
    """
    device = CardDevice.open(driver.path, fake.nvrtc(shim_mode), cubins=fake.shim.CACHE / "cubins")
    store = Store.open(path)
    slot_bytes = max(layer.record_bytes for layer in store.layers)
    pools = pools_of(store, slot_bytes=slot_bytes, num_ram_slots=num_ram, num_device_slots=num_vram)
    engine = build(
        store,
        Blueprint(
            pools=replace(pools, chunk_bytes=slots_per_chunk * slot_bytes),
            device=torch.device("cpu"),
            dtype=torch.float32,
            make_copier=lambda: SimulatedCopier(latency_s=0, page_lock=PageLock(SessionLocks(device))),
            dense_codec=dense_codec,
        ),
    )
    hf, hierarchy = engine.hf, engine.hierarchy
    driver.set(adopts=1)
    for chunk in hierarchy.arena.chunks_behind(0):
        driver.declare_hosts(chunk.data_ptr(), chunk.numel())
    try:
        codecs = [store.codec_of(index) for index in range(len(engine.layers))]
        make_fast(hf, is_exact=False, context=context, kept=torch.bfloat16, hierarchy=hierarchy)
        card = install(hf, engine.layers, hierarchy, codecs, device, context=context)
        yield CardModel(engine, card, driver)
    finally:
        hierarchy.close()
        device.session.close()


def logits(hf: Any, num_new: int = NUM_NEW) -> Tensor:
    """Of each new token."""
    ids, _ = tiny_prompt(1, NUM_PROMPT)
    out = hf.generate(
        input_ids=ids,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
        max_new_tokens=num_new,
    )
    found = torch.stack(out.logits)
    assert found.abs().max() > 0.1
    return found


def check_tables(model: CardModel) -> None:
    """The host's residency is what the card has, and every lent slot has one expert."""
    pool, hierarchy = model.card.tables.pool, model.engine.hierarchy
    model.card.settle()
    slot_of = (ctypes.c_int32 * hierarchy.scheduler.keys.total).from_address(pool.tables.slot_of)
    assert list(slot_of) == pool.slot_of.tolist()
    resident = {key for key in range(len(slot_of)) if slot_of[key] >= 0}
    assert resident == set(hierarchy.scheduler.residency.resident_keys())
    assert len({slot_of[key] for key in resident}) == len(resident)
