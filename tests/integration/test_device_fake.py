"""Prompt and decode on a `cuda` that exists only as metadata: every tensor must be where, and what, it should be.

A host synchronization that is not the one at `fetch_top_k` cannot work here: there are no values to bring.
"""

import sys
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import torch
from support.cuda_guard import cuda_guard_missing
from support.device_operations import DeviceOperations
from support.pressure import bound_of
from support.tiny_models import COMMON, FAMILIES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from offload_moe.checkpoint.experts import find_experts
from offload_moe.experts import routing
from offload_moe.experts.arithmetic import choose_arithmetic
from offload_moe.experts.attach import BoundExperts, attach, detach_parameters
from offload_moe.experts.contract import ExpertsContract
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.memory.mover import Arrived
from offload_moe.native.device import record_linear
from offload_moe.native.kernels import SlotTable
from offload_moe.quant import CODECS, Codec, ExpertShape, Matrix, get_codec
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler

CUDA = torch.device("cuda", 0)
NUM_SLOTS = 3


class MetadataMover:
    """Every record arrives at once: there are no bytes to bring."""

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        arrived(slot, 0, None)

    def cancel(self, slot: int) -> bool:
        return False

    def promote(self, slot: int) -> None:
        pass

    def drain(self) -> None:
        pass

    def used(self, slots: object) -> None:
        pass

    def close(self) -> None:
        pass


class Fetches:
    """Stands in for `fetch_top_k`: random ids instead of values that do not exist."""

    def __init__(self, num_experts: int) -> None:
        self.num_calls = 0
        self.num_experts = num_experts
        self.random = np.random.default_rng(0)

    def __call__(self, top_k_index: Tensor) -> routing.Ids:
        assert top_k_index.device == CUDA
        self.num_calls += 1
        num_tokens, num_places = top_k_index.shape
        return np.stack([self.random.permutation(self.num_experts)[:num_places] for _ in range(num_tokens)])


@pytest.fixture(autouse=True)
def _fake_cuda() -> Iterator[None]:
    if reason := cuda_guard_missing():
        pytest.skip(reason)
    clear_tables()
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=64, in_features=64),))
    for codec in CODECS.values():
        codec.decode(shape, torch.zeros(codec.layout(shape).record_bytes, dtype=torch.uint8), torch.float32)
    yield
    clear_tables()


def clear_tables() -> None:
    """Tables that are made once must be neither fake nor made in inference mode, which a fake device cannot take."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("offload_moe.quant", "offload_moe.native")):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def fake_model(family: str, codec: Codec, num_slots: int = NUM_SLOTS, **changes: object) -> PreTrainedModel:
    """Attached, on cuda, in bf16; inside a FakeTensorMode."""
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | changes))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="eager").eval()
    layers = find_experts(model)
    keys = ExpertKeys(layer.num_experts for layer in layers)
    policy = make_policy("lru", keys, num_slots=num_slots)
    scheduler = Scheduler(Residency(SlotTable(keys.total, num_slots), policy), MetadataMover(), keys=keys)
    num_bytes = codec.layout(layers[0].shape).record_bytes
    slots = [torch.empty(num_bytes, dtype=torch.uint8, device=CUDA) for _ in range(num_slots)]
    detach_parameters(layers)
    bound = []
    for ordinal, layer in enumerate(layers):
        arithmetic = choose_arithmetic(cast(ExpertsContract, layer.module), layer.shape, codec, CUDA)
        assert isinstance(arithmetic, DeviceArithmetic)
        bound.append(BoundExperts(ordinal, layer.num_experts, scheduler, slots.__getitem__, arithmetic))
    attach(layers, bound)
    return model


def num_experts_of(family: str) -> int:
    sizes = FAMILIES[family]
    return next(cast(int, sizes[k]) for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in sizes)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompt_and_decode_on_cuda(family: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(num_experts_of(family))
    monkeypatch.setattr(routing, "fetch_top_k", fetches)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = fake_model(family, get_codec(codec))
        num_layers = len(bound_of(model))
        out = model(input_ids=torch.ones(1, 9, dtype=torch.int64, device=CUDA), use_cache=True)
        assert (out.logits.device, out.logits.dtype, out.logits.shape) == (CUDA, torch.bfloat16, (1, 9, 128))
        assert fetches.num_calls == num_layers
        token = torch.ones(1, 1, dtype=torch.int64, device=CUDA)
        out = model(input_ids=token, **with_cache(cache_from(out)), use_cache=True)
        assert (out.logits.device, out.logits.dtype, out.logits.shape) == (CUDA, torch.bfloat16, (1, 1, 128))
        assert fetches.num_calls == 2 * num_layers
    assert num_layers >= 2


@pytest.mark.parametrize(("codec", "limit"), [("nf4", 30), ("bf16", 30), ("int8", 62)])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_few_device_operations_per_layer(
    codec: str, limit: int, weights_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-8, one token, all resident. The ids on their way to the host count as one."""
    monkeypatch.setattr(routing, "fetch_top_k", Fetches(8))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        sizes = {"num_experts": 8, "num_experts_per_tok": 8, "moe_intermediate_size": 128}
        model = fake_model("qwen3_moe", get_codec(codec), 24, **sizes)
        (experts, *_) = bound_of(model)
        hidden = torch.empty(1, 64, dtype=torch.bfloat16, device=CUDA)
        ids = torch.empty(1, 8, dtype=torch.int64, device=CUDA)
        weights = torch.empty(1, 8, dtype=weights_dtype, device=CUDA)
        experts(hidden, ids, weights)
        with DeviceOperations() as operations:
            experts(hidden, ids, weights)
    assert operations.total + 1 <= limit, operations.counts


def on_cpu(x: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.empty_like(record, device="cpu")


def in_double(x: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
    return x.double(), record


def cut_short(x: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
    return x, record[:-8192]


@pytest.mark.parametrize("spoil", [on_cpu, in_double, cut_short])
@pytest.mark.parametrize("codec_name", sorted(CODECS))
def test_the_wrapper_checks_device_dtype_and_size(
    codec_name: str, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    codec = get_codec(codec_name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device("cuda"):
        config = AutoConfig.for_model("qwen3_moe", **(COMMON | FAMILIES["qwen3_moe"]))
        shape = find_experts(AutoModelForCausalLM.from_config(config))[0].shape
        x = torch.empty(2, 64, dtype=torch.bfloat16)
        record = torch.empty(codec.layout(shape).record_bytes, dtype=torch.uint8)
        record_linear(x, record, shape, codec, "gate_up_proj")
        with pytest.raises(AssertionError):
            record_linear(*spoil(x, record), shape, codec, "gate_up_proj")
