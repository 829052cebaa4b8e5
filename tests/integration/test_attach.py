"""Attached models against transformers eager: the experts come from records, through slots, in waves."""

import random
from collections.abc import Callable

import pytest
import torch
from support.offload import offload
from support.pressure import bound_of, scheduler_of
from support.products import products_of_operands_alone
from support.tiny_models import FAMILIES, tiny_model, tiny_prompt
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.experts.arithmetic import Arithmetic, choose_arithmetic
from offload_moe.experts.contract import ExpertsContract
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.quant import Codec, ExpertShape


@products_of_operands_alone()
def prompt_and_decode(model: PreTrainedModel, batch: int) -> Tensor:
    """Logits of a prompt, then of six decode steps with the cache."""
    ids, mask = tiny_prompt(batch, 9)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        logits = [out.logits]
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            out = model(input_ids=token, attention_mask=mask, **with_cache(cache_from(out)), use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_slots", [1, 5, 24])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lossless_codec_is_bit_equal_to_eager(family: str, num_slots: int, batch: int) -> None:
    attached, oracle = offload(tiny_model(family), "bf16", num_slots)
    expected = prompt_and_decode(oracle, batch)
    assert expected.abs().max() > 0.1
    assert torch.equal(prompt_and_decode(attached, batch), expected)


@pytest.mark.parametrize(("num_ram_slots", "num_device_slots"), [(1, 1), (2, 5), (24, 3), (7, 24)])
def test_the_device_tier_changes_no_bit(num_ram_slots: int, num_device_slots: int) -> None:
    draw = random.Random(0)
    copier = SimulatedCopier(delay_s=lambda: draw.random() * 0.001)
    attached, oracle = offload(tiny_model("qwen3_moe"), "bf16", num_ram_slots, copier, num_device_slots)
    assert torch.equal(prompt_and_decode(attached, 3), prompt_and_decode(oracle, 3))
    copier.close()


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_quantized_codecs_follow_eager_on_the_dequantized_experts(family: str, codec: str) -> None:
    attached, oracle = offload(tiny_model(family), codec, 5)
    torch.testing.assert_close(prompt_and_decode(attached, 3), prompt_and_decode(oracle, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_device_arithmetic_follows_eager(family: str, codec: str) -> None:
    copier = SimulatedCopier()
    attached, oracle = offload(tiny_model(family), codec, 5, copier, 4, DeviceArithmetic)
    torch.testing.assert_close(prompt_and_decode(attached, 3), prompt_and_decode(oracle, 3), rtol=1e-4, atol=1e-4)
    copier.close()


def native(is_exact: bool) -> Callable[..., Arithmetic]:
    return lambda module, shape, codec: choose_arithmetic(module, shape, codec, torch.device("cpu"), is_exact=is_exact)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_native_arithmetic_follows_eager(family: str, codec: str) -> None:
    attached, oracle = offload(tiny_model(family), codec, 24, arithmetic=native(is_exact=True))
    torch.testing.assert_close(prompt_and_decode(attached, 3), prompt_and_decode(oracle, 3), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_native_results_do_not_depend_on_the_number_of_slots(family: str, is_exact: bool) -> None:
    expected = prompt_and_decode(offload(tiny_model(family), "nf4", 24, arithmetic=native(is_exact))[0], 3)
    for num_slots in (1, 2, 5):
        attached, _ = offload(tiny_model(family), "nf4", num_slots, arithmetic=native(is_exact))
        assert torch.equal(prompt_and_decode(attached, 3), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bf16_compute_stays_within_tolerance(family: str) -> None:
    attached, oracle = offload(tiny_model(family).to(torch.bfloat16), "bf16", 5)
    got, expected = prompt_and_decode(attached, 3).float(), prompt_and_decode(oracle, 3).float()
    assert (got - expected).norm() / expected.norm() < 0.01


def test_lossless_kernels_in_bf16_follow_eager_whatever_the_slots() -> None:
    def in_bf16(module: ExpertsContract, shape: ExpertShape, codec: Codec) -> Arithmetic:
        return choose_arithmetic(module, shape, codec, torch.device("cpu"), dtype=torch.bfloat16)

    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    results = []
    for num_slots in (24, 5, 1):
        attached, oracle = offload(model, "bf16", num_slots, arithmetic=in_bf16)
        results.append(prompt_and_decode(attached, 3))
    expected = prompt_and_decode(oracle, 3).float()
    assert (results[0].float() - expected).norm() / expected.norm() < 0.02
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def swap_two_experts(attached: PreTrainedModel) -> None:
    scheduler = scheduler_of(attached)
    records = scheduler.mover.records
    records[0], records[1] = records[1], records[0]


def drop_the_last_pair(attached: PreTrainedModel) -> None:
    for bound in bound_of(attached):
        original: Callable[..., Tensor] = bound.arithmetic.expert
        bound.arithmetic.expert = lambda x, record, original=original: original(x, record) * 0.999


@pytest.mark.parametrize("mutation", [swap_two_experts, drop_the_last_pair])
def test_a_mutation_is_noticed(mutation: Callable[[PreTrainedModel], None]) -> None:
    attached, oracle = offload(tiny_model("mixtral"), "bf16", 5)
    mutation(attached)
    assert not torch.equal(prompt_and_decode(attached, 3), prompt_and_decode(oracle, 3))


def test_two_models_in_one_process_from_one_config() -> None:
    first, first_oracle = offload(tiny_model("qwen3_moe", seed=1), "bf16", 4)
    second, second_oracle = offload(tiny_model("qwen3_moe", seed=2), "bf16", 7)
    for model, oracle in ((first, first_oracle), (second, second_oracle), (first, first_oracle)):
        assert torch.equal(prompt_and_decode(model, 1), prompt_and_decode(oracle, 1))


def test_expert_parameters_are_gone() -> None:
    attached, _ = offload(tiny_model("mixtral"), "bf16", 4)
    assert not any("experts" in name for name, _ in attached.named_parameters())
