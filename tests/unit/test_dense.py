"""QuantLinear against the linear layer it replaces."""

import pytest
import torch
from torch import nn

from offload_moe.dense import NarrowEmbedding, QuantLinear, narrow_embeddings
from offload_moe.quant import ExpertShape, Matrix, get_codec


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_linear_follows_the_decoded_one(codec: str, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(72, 40, bias=has_bias).requires_grad_(False)
    shape = ExpertShape(
        matrices=(Matrix(name="weight", out_features=40, in_features=72),),
        biases=(("bias", 40),) if has_bias else (),
    )
    record = get_codec(codec).encode(shape, dict(dense.named_parameters()))
    dense.load_state_dict(get_codec(codec).decode(shape, record, torch.float32))
    quantized = QuantLinear(record, shape, get_codec(codec))
    x = torch.randn(2, 5, 72).to(dtype)
    expected = dense(x.float())
    assert expected.abs().max() > 0.1
    got = quantized(x)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() / expected.norm() < 0.02


def test_it_is_not_a_parameter() -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=8, in_features=64),))
    record = get_codec("nf4").encode(shape, {"weight": torch.randn(8, 64)})
    layer = QuantLinear(record, shape, get_codec("nf4"))
    assert not list(layer.parameters())
    assert not layer.state_dict()


def test_embeddings_are_kept_in_bf16_where_that_loses_nothing() -> None:
    exact = nn.Embedding(10, 4)
    exact.weight.data = exact.weight.data.to(torch.bfloat16).float()
    tied = nn.Embedding(10, 4)
    tied.weight.data = tied.weight.data.to(torch.bfloat16).float()
    head = nn.Linear(4, 10, bias=False)
    head.weight = tied.weight
    model = nn.ModuleDict({"exact": exact, "lossy": nn.Embedding(10, 4), "tied": tied, "head": head})
    ids = torch.tensor([[3, 0, 9]])
    expected = exact(ids)
    narrow_embeddings(model)
    assert isinstance(model["exact"], NarrowEmbedding)
    assert model["exact"].weight.dtype == torch.bfloat16
    assert torch.equal(model["exact"](ids), expected)
    assert model["exact"](ids).dtype == torch.float32
    assert type(model["lossy"]) is nn.Embedding
    assert type(model["tied"]) is nn.Embedding
