"""QuantLinear against the linear layer it replaces."""

import pytest
import torch
from torch import nn

from offload_moe.dense import NarrowEmbedding, QuantLinear, lookup_tables
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


def test_embeddings_that_are_only_looked_up_are_found() -> None:
    tied, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = tied.weight
    scaled = type("ScaledEmbedding", (nn.Embedding,), {})(10, 4)
    model = nn.ModuleDict({"plain": nn.Embedding(10, 4), "scaled": scaled, "tied": tied, "head": head})
    assert lookup_tables(model) == {"plain"}
    assert lookup_tables(model, "head") == {"plain", "tied"}


def test_a_narrow_embedding_gives_the_same_values() -> None:
    exact = nn.Embedding(10, 4)
    exact.weight.data = exact.weight.data.to(torch.bfloat16).float()
    narrow = NarrowEmbedding(exact.weight.detach().to(torch.bfloat16), torch.float32)
    ids = torch.tensor([[3, 0, 9]])
    assert torch.equal(narrow(ids), exact(ids))
    assert narrow(ids).dtype == torch.float32
