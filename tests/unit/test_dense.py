"""QuantLinear against the linear layer it replaces."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from offload_moe.decode.dense import NarrowEmbedding, QuantLinear, lookup_tables
from offload_moe.native import device
from offload_moe.native.device import record_linear
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize(("codec", "has_bias"), [("int8", True), ("int8", False), ("mxfp4", True)])
def test_tiles_of_rows_give_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, codec: str, has_bias: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix = Matrix(name="weight", out_features=300, in_features=72)
    shape = ExpertShape(matrices=(matrix,), biases=(("bias", 300),) if has_bias else ())
    weights = {"weight": torch.randn(300, 72), "bias": torch.randn(300)}
    record = get_codec(codec).encode(shape, weights)
    x = torch.randn(num_tokens, 72).to(dtype)
    whole = record_linear(x, record, shape, get_codec(codec), "weight")
    assert whole.float().abs().mean() > 1
    monkeypatch.setattr(device, "TILE_WEIGHTS", 64 * 72 + 5)  # five tiles, the last one shorter
    assert torch.equal(record_linear(x, record, shape, get_codec(codec), "weight"), whole)


def test_a_large_head_is_never_decoded_as_a_whole() -> None:
    torch.manual_seed(0)
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=20_000, in_features=1024),))
    codec = get_codec("int8")
    record = torch.randint(0, 3, (codec.layout(shape).num_bytes,), dtype=torch.uint8)
    codec.layout(shape).view(record, "weight.scales").uniform_(0.5, 1.5)
    sizes = []

    class Watched(type(codec)):  # type: ignore[misc]
        def decode_matrix(self, planes: Mapping[str, torch.Tensor]) -> torch.Tensor:
            sizes.append(planes["codes"].numel())
            return super().decode_matrix(planes)

    x = torch.randn(2, 1024)
    got = device.RecordLinear(shape, Watched(), "weight")(x, record)
    assert sizes == [16_384 * 1024, (20_000 - 16_384) * 1024]
    expected = x @ codec.decode(shape, record, torch.float32)["weight"].T
    assert expected.abs().mean() > 1
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-2)


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


@pytest.mark.parametrize("codec", ["nf4", "int8", "mxfp4"])
def test_a_record_is_in_panels_on_the_host_and_in_rows_elsewhere(codec: str) -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=40, in_features=72),))
    rows = get_codec(codec).encode(shape, {"weight": torch.randn(40, 72)})
    linear = QuantLinear(rows.clone(), shape, get_codec(codec))
    assert linear.in_panels
    assert not torch.equal(linear.record, rows)
    assert torch.equal(linear.in_rows(), rows)
    x = torch.randn(3, 72)
    expected = linear(x)
    assert torch.equal(linear.to(torch.float64).record, linear.to("cpu").record)  # nothing moves
    assert torch.equal(linear(x), expected)
    assert (linear(x.half()) - expected).norm() / expected.norm() < 0.02  # a dtype that no kernel takes
    assert not linear.to("meta").in_panels


def test_exact_linears_keep_their_rows() -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=40, in_features=72),))
    rows = get_codec("nf4").encode(shape, {"weight": torch.randn(40, 72)})
    linear = QuantLinear(rows.clone(), shape, get_codec("nf4"), is_exact=True)
    assert not linear.in_panels
    assert torch.equal(linear.record, rows)
