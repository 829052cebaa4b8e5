"""What the fast path recognizes, and what it must leave alone."""

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from offload_moe.decode.dense import QuantLinear, quantize_linear
from offload_moe.decode.mlp import FusedMLP, fuse_mlps
from offload_moe.decode.norm import FusedLayerNorm, FusedRMSNorm, fuse_layer_norms, fuse_norms
from offload_moe.decode.rotary import BLOCK, RotaryTable, StepRotary, rotate
from offload_moe.decode.router import shorten_routers
from offload_moe.decode.shorten import shorten_attention
from offload_moe.families.read_layer import layer_spec
from offload_moe.quant import get_codec

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "offload_moe"


def filled(norm: nn.Module) -> nn.Module:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recognized_norm_gives_the_modules_results(dtype: torch.dtype) -> None:
    norm = filled(LlamaRMSNorm(96, eps=1e-3)).to(dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    expected = norm(x)
    assert fuse_norms(norm, is_exact=dtype == torch.float32) == 1
    assert isinstance(norm.forward, FusedRMSNorm)
    if dtype == torch.float32:
        assert torch.equal(norm(x), expected)
    else:
        assert torch.allclose(norm(x).float(), expected.float(), rtol=2e-2)


def test_layer_norms_of_declared_layers_are_kernel_calls() -> None:
    model = tiny_model("phimoe").requires_grad_(False)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 64) * 9 + 4
    expected = [norm(x) for norm in norms]
    model.model.layers[0].added = nn.LayerNorm(64)
    assert fuse_layer_norms(model) == len(norms) == 7
    assert all(isinstance(norm.forward, FusedLayerNorm) for norm in norms)
    for norm, module_result in zip(norms, expected, strict=True):
        assert torch.allclose(norm(x), module_result, atol=1e-4)
        assert torch.equal(norm(x)[1, 2], norm(x[1, 2]))
        assert norm.double()(x.double()).dtype == torch.float64
    assert "forward" not in vars(model.model.layers[0].added)


def test_layer_norms_of_other_layers_stay_as_they_are() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].input_layernorm = nn.LayerNorm(64, bias=False)
    model.model.norm = nn.LayerNorm(64, bias=False)
    assert fuse_layer_norms(model) == 0
    other = tiny_model("jamba")
    assert not any(map(layer_spec, other.model.layers))
    other.model.norm = nn.LayerNorm(64)
    assert fuse_layer_norms(other) == 0


class ClippedNorm(LlamaRMSNorm):
    """Looks like an RMS norm, and is one, until its input is large."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.clamp(-20, 20))


class CenteredNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states) * gate.sigmoid()


@pytest.mark.parametrize("norm", [ClippedNorm(64), CenteredNorm(64), GatedNorm(64), nn.LayerNorm(64, bias=False)])
def test_other_norms_stay_as_they_are(norm: nn.Module) -> None:
    assert fuse_norms(filled(norm), is_exact=False) == 0
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("make", [Qwen3NextRMSNorm, Qwen3_5MoeRMSNorm, Gemma3RMSNorm])
def test_weights_that_are_added_to_one_are_added_once(make: Any) -> None:
    norm, x = filled(make(96, eps=1e-3)), torch.randn(2, 5, 96)
    expected = norm(x)
    assert fuse_norms(norm, is_exact=False) == 1
    assert isinstance(norm.forward, FusedRMSNorm)
    assert norm.forward.kernel is not None
    assert torch.equal(norm.forward.weight, 1.0 + norm.weight)
    assert (norm(x) - expected).norm() <= 1e-6 * expected.norm()


def test_weights_that_are_added_to_one_stay_where_no_bit_may_change_or_sums_round() -> None:
    for norm in (filled(Qwen3NextRMSNorm(96)), filled(Qwen3NextRMSNorm(96)).to(torch.bfloat16)):
        assert fuse_norms(norm, is_exact=norm.weight.dtype == torch.float32) == 0


def test_norms_of_one_kind_keep_their_own_weights() -> None:
    norms = nn.ModuleList([filled(LlamaRMSNorm(32)), filled(LlamaRMSNorm(32)), filled(LlamaRMSNorm(32, eps=0.5))])
    x = torch.randn(3, 32)
    expected = [norm(x) for norm in norms]
    assert fuse_norms(norms, is_exact=True) == 3
    assert all(torch.equal(norm(x), wanted) for norm, wanted in zip(norms, expected, strict=True))


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_rotation_is_the_textbook_one(is_half: bool, head_dim: int) -> None:
    angles = torch.rand(2, 1, 4)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 1, head_dim)
    first, second, rest = x.split([4, 4, head_dim - 8], dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    expected = torch.cat((first * c - second * s, second * c + first * s, rest), -1)
    embeddings = (cos, sin) if is_half else (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    assert torch.equal(rotate(x, *StepRotary(is_half=is_half).prepare(embeddings)), expected)


def test_rotary_prepares_anew_for_each_token() -> None:
    rotary = StepRotary(is_half=False)
    first, second = [(torch.rand(1, 1, 4), torch.rand(1, 1, 4)) for _ in range(2)]
    kept = rotary.prepare(first)[0]
    assert rotary.prepare(first)[0] is kept
    assert torch.equal(rotary.prepare(second)[0], second[0].unsqueeze(1))


def embedded(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None] * torch.tensor([1.0, 0.1, 0.01])
    return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def test_a_table_gives_what_is_prepared_for_each_position() -> None:
    calls: list[Tensor] = []

    def embed(positions: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(positions)
        return embedded(positions)

    table = RotaryTable(embed, is_half=False, is_by_position=True)
    for positions in ([0], [1], [BLOCK - 1, BLOCK, BLOCK + 1], [5 * BLOCK + 7, 3], [2]):
        found = table.rows(torch.tensor([positions]))
        assert found is not None
        for row, position in enumerate(positions):
            expected = StepRotary(is_half=False).prepare(embedded(torch.tensor([[position]])))
            for got, wanted in zip(found, expected, strict=True):
                assert torch.equal(got[row], wanted.flatten())
    assert len(calls) == 3


@pytest.mark.parametrize("positions", [torch.zeros(3, 1, 1, dtype=torch.int64), torch.tensor([[1.5]])])
def test_planes_and_fractions_are_not_looked_up(positions: Tensor) -> None:
    assert RotaryTable(embedded, is_half=False, is_by_position=True).rows(positions) is None
    assert RotaryTable(embedded, is_half=False, is_by_position=False).rows(torch.tensor([[1]])) is None


class MLP(nn.Module):
    def __init__(self, act_fn: Any, codec: str = "int8") -> None:
        super().__init__()
        self.act_fn = act_fn
        for name, shape in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
            setattr(self, name, quantize_linear(torch.randn(shape) * 0.1, get_codec(codec)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ScaledMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
@pytest.mark.parametrize("codec", ["int8", "nf4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_mlp_follows_its_three_linears(act_fn: nn.Module, codec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parent = nn.ModuleDict({"mlp": MLP(act_fn, codec)})
    for x in (torch.randn(2, 3, 64), torch.randn(1, 64)):
        expected = MLP.forward(parent["mlp"], x.to(dtype)) if isinstance(parent["mlp"], MLP) else None
        fused = nn.ModuleDict({"mlp": parent["mlp"]})
        assert fuse_mlps(fused) == 1
        got = fused["mlp"](x.to(dtype))
        assert isinstance(fused["mlp"], FusedMLP)
        assert got.dtype == dtype
        assert got.shape == x.shape
        assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("mlp", [ScaledMLP(nn.SiLU()), MLP(nn.Softplus())])
def test_other_mlps_stay_as_they_are(mlp: nn.Module) -> None:
    parent = nn.ModuleDict({"mlp": mlp})
    assert fuse_mlps(parent) == 0
    assert parent["mlp"] is mlp


def test_attention_that_scales_by_position_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1).requires_grad_(False)
    attention_class = type(model.model.layers[0].self_attn)
    plain = attention_class.forward

    def scaled(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(self, hidden_states, *args, **kwargs)
        return out * (1 + kwargs["position_ids"].div(500, rounding_mode="floor")).unsqueeze(-1), weights

    def refusing(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise KeyError(self.layer_idx)

    for forward in (scaled, refusing):
        monkeypatch.setattr(attention_class, "forward", forward)
        assert shorten_attention(model, is_exact=False) == 0
    monkeypatch.undo()
    assert shorten_attention(model, is_exact=True) == 1


class Router(nn.Module):
    """transformers' usual router: the greatest of a softmax, as shares of all experts or of the chosen ones."""

    def __init__(self, *, is_normalized: bool, temperature: float = 1.0, shift: int = 0) -> None:
        super().__init__()
        self.top_k, self.is_normalized, self.temperature, self.shift = 4, is_normalized, temperature, shift
        self.weight = nn.Parameter(torch.randn(24, 64).bfloat16().float(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden_states, self.weight)
        values, ids = (logits / self.temperature).softmax(-1).topk(self.top_k)
        weights = values / values.sum(-1, keepdim=True) if self.is_normalized else values
        return logits, weights, (ids + self.shift) % len(self.weight)


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("is_in_bf16", [True, False])
def test_a_recognized_router_gives_the_modules_results(is_normalized: bool, is_in_bf16: bool) -> None:
    router = Router(is_normalized=is_normalized)
    if not is_in_bf16:
        router.weight.copy_(torch.randn(24, 64))
    inputs = [torch.randn(1, 64) for _ in range(20)]
    expected = [router(x) for x in inputs]
    assert shorten_routers(router) == 1
    for x, wanted in zip(inputs, expected, strict=True):
        logits, weights, ids = router(x)
        assert torch.equal(ids, wanted[2])
        assert torch.allclose(logits, wanted[0], atol=1e-5)
        assert torch.allclose(weights, wanted[1], rtol=1e-4, atol=1e-7)
    assert router(torch.randn(3, 64))[2].shape == (3, 4)


@pytest.mark.parametrize("share", [1.0, 2**-10, 2**-20])
def test_a_router_is_recognized_where_only_rounding_tells_its_experts_apart(share: float) -> None:
    """The demo's are such: nearly equal logits, some of whose shares round to the same number."""
    router = Router(is_normalized=True)
    router.weight.mul_(share)
    assert shorten_routers(router) == 1


def test_other_routers_stay_as_they_are() -> None:
    for router in (Router(is_normalized=True, temperature=2.0), Router(is_normalized=True, shift=1)):
        assert shorten_routers(router) == 0
        assert "forward" not in vars(router)


class WideRouter(Router):
    """Weights that make logits of hundreds on the largest probe: their rounding shows in the shares."""

    def __init__(self, *, share: float, **settings: Any) -> None:
        super().__init__(is_normalized=False, **settings)
        self.weight = nn.Parameter((torch.randn(24, 128) * share).bfloat16().float(), requires_grad=False)


@pytest.mark.parametrize("share", [0.2, 0.5, 2.0])
def test_a_router_with_large_logits_is_recognized(share: float) -> None:
    torch.manual_seed(5)
    router = WideRouter(share=share)
    probe = torch.randn(1, 128) * 30
    expected = router(probe)
    assert expected[0].abs().max() > 20
    assert shorten_routers(router) == 1
    got = router(probe)
    counts = expected[1] > 1e-30  # experts whose shares vanish are tied
    assert torch.equal(got[2][counts], expected[2][counts])
    assert torch.allclose(got[1], expected[1], rtol=1e-2)


@pytest.mark.parametrize("share", [0.02, 0.2, 2.0])
def test_a_router_with_another_temperature_is_not(share: float) -> None:
    torch.manual_seed(5)
    assert shorten_routers(WideRouter(share=share, temperature=1.001)) == 0


class WithPart(LlamaRMSNorm):
    """A norm that fails on every probe: in its own line, or in a part of ours."""

    def __init__(self, size: int, part: Any = None) -> None:
        super().__init__(size)
        self.fail = part

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.fail is None:
            raise ValueError("not for probes")
        return self.fail(hidden_states)


def test_a_module_that_refuses_a_probe_stays_as_it_is() -> None:
    assert fuse_norms(filled(WithPart(16)), is_exact=True) == 0


@pytest.mark.parametrize("error", [TypeError, RuntimeError, IndexError])
def test_an_error_of_our_own_code_in_a_check_is_no_refusal(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FusedRMSNorm, hidden_states: Tensor) -> Tensor:
        raise error("a fault of ours")

    monkeypatch.setattr(FusedRMSNorm, "__call__", broken)
    with pytest.raises(error, match="a fault of ours"):
        fuse_norms(filled(LlamaRMSNorm(16)), is_exact=True)


def test_an_error_of_torch_in_a_call_of_ours_is_no_refusal() -> None:
    """Its innermost lines are those of torch's Python code; the module's own calls of the same are its refusals."""
    weight = torch.ones(1, 1, 16)
    ours = FusedRMSNorm(weight, 1e-6, is_exact=True)
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        fuse_norms(filled(WithPart(16, ours)), is_exact=True)
    theirs = partial(functional.rms_norm, normalized_shape=[1, 1, 16], weight=weight)
    assert fuse_norms(filled(WithPart(16, theirs)), is_exact=True) == 0


def test_an_error_in_a_part_of_ours_inside_of_a_module_is_no_refusal() -> None:
    """A record of another shape than its layer says: the first line that fails is ours."""
    linear = quantize_linear(torch.randn(8, 16), get_codec("int8"))
    norm = filled(WithPart(16, lambda x: QuantLinear.forward(linear, x[..., :3])))
    with pytest.raises(RuntimeError, match="invalid for input"):
        fuse_norms(norm, is_exact=True)


def replaces_a_forward(tree: ast.AST) -> bool:
    """Whether a source sets the forward of a module, or another module in its place."""
    nodes = list(ast.walk(tree))
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    return any(isinstance(target, ast.Attribute) and target.attr == "forward" for target in targets) or any(
        ast.unparse(call.args[0]) not in ("self", "cache", "hf") for call in calls
    )


def test_every_replacement_is_listed() -> None:
    """In the table of decision 060; what is set on models and caches stands in a section of its own."""
    text = (ROOT / "docs/decisions/060-fast-path.md").read_text("utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("| `"))
    paths = [path for path in sorted((PACKAGE / "decode").glob("*.py")) if path.stem != "__init__"]
    found = {path.name for path in paths if replaces_a_forward(ast.parse(path.read_text("utf-8")))}
    assert {"delta.py", "norm.py", "mlp.py", "latent.py", "shorten.py"} <= found
    assert not {name for name in found if f"`{name}`" not in table}
    section = text.split("## What is set on transformers' objects")[1].split("\n## ")[0]
    sources = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    assert set(re.findall(r"_offload_moe_\w+", section)) == set(re.findall(r'"(_offload_moe_\w+)"', sources))
