"""Every decorated experts class of the installed transformers gives eager's bits through records, slots and waves.

Classes are discovered: one that appears in a newer transformers is tested by itself.
"""

import pytest
import torch
from support.families import Holder, decorated_classes, tiny_experts
from support.offload import offload
from support.products import products_of_operands_alone
from torch import Tensor, nn

CLASSES = decorated_classes()


@products_of_operands_alone()
def compute(model: nn.Module, num_tokens: int) -> Tensor:
    experts = model.experts
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 32, generator=generator)
    ids = torch.rand(num_tokens, 6, generator=generator).topk(3).indices
    weights = torch.rand(num_tokens, 3, generator=generator)
    with torch.inference_mode():
        return experts(hidden, ids, weights)


def test_there_are_as_many_as_there_were() -> None:
    """Fewer would mean that the discovery misses some: 65 in transformers 5.23."""
    assert len(CLASSES) >= 65


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_the_contract_gives_the_bits_of_eager(module: str, name: str) -> None:
    attached, oracle = offload(Holder(tiny_experts(module, name)), "bf16", 2)
    assert not list(attached.experts.parameters(recurse=False))
    for num_tokens in (1, 7):
        expected = compute(oracle, num_tokens)
        assert expected.abs().max() > 1e-3
        assert torch.equal(compute(attached, num_tokens), expected)
    changed = next(oracle.experts.parameters(recurse=False))
    changed.data[:] += 0.5
    assert not torch.equal(compute(attached, 7), compute(oracle, 7))
