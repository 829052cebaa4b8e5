"""What the kernel tests share: an expert with random weights, its fp64 reference, the kernel sets of this machine."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from offload_moe.native.bindings import INSTRUCTION_SETS
from offload_moe.quant import ExpertShape, Matrix, RecordLayout, get_codec
from offload_moe.quant.layout import weight_shape


def runnable_sets() -> list[str]:
    """Kernel sets that this build and machine can run, `portable` last."""
    names: list[str] = []
    for name in INSTRUCTION_SETS:
        try:
            kernels.select_instruction_set(name)
        except ConfigError:
            continue
        names.append(name)
    return names


PANEL_SETS = runnable_sets()
SETS = [name for name in PANEL_SETS if name not in ("avx512vl", "avxvnni")]  # these have AVX2's kernels for rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A few experts of one shape, encoded, and what their records decode to."""

    codec: str
    shape: ExpertShape
    layout: RecordLayout
    records: list[Tensor]
    decoded: list[dict[str, Tensor]]


def make_experts(codec: str, hidden: int, intermediate: int, *, count: int = 4, has_bias: bool = True) -> Experts:
    first, second = 2 * intermediate, hidden
    shape = ExpertShape(
        matrices=(
            Matrix(name="gate_up_proj", out_features=first, in_features=hidden),
            Matrix(name="down_proj", out_features=second, in_features=intermediate),
        ),
        biases=(("gate_up_proj_bias", first), ("down_proj_bias", second)) if has_bias else (),
    )
    generator = torch.Generator().manual_seed(hidden * 7 + intermediate)
    coder = get_codec(codec)
    records = [
        coder.encode(shape, {n: torch.randn(d, generator=generator) * 0.08 for n, d in shape.module_shapes().items()})
        for _ in range(count)
    ]
    decoded = [{n: v.double() for n, v in coder.decode(shape, r, torch.float32).items()} for r in records]
    return Experts(codec=codec, shape=shape, layout=coder.layout(shape), records=records, decoded=decoded)


def route(num_tokens: int, num_experts: int) -> tuple[list[int], list[int], list[float]]:
    """Offsets, token ids and weights: token t goes to experts t and t + 1, modulo their number."""
    offsets, token_ids = [0], []
    for expert in range(num_experts):
        token_ids += [t for t in range(num_tokens) if (expert - t) % num_experts < 2]
        offsets.append(len(token_ids))
    return offsets, token_ids, [0.25 + 0.5 * ((7 * i) % 11) / 11 for i in range(len(token_ids))]


def reference(experts: Experts, x: Tensor, routing: tuple[list[int], list[int], list[float]]) -> Tensor:
    """The layer in fp64 on the decoded weights, SiLU gated."""
    offsets, token_ids, weights = routing
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert, parts in enumerate(experts.decoded):
        for pair in range(offsets[expert], offsets[expert + 1]):
            token = token_ids[pair]
            pre = parts["gate_up_proj"] @ x[token].double() + parts.get("gate_up_proj_bias", 0.0)
            gate, up = pre.chunk(2)
            result = parts["down_proj"] @ (functional.silu(gate) * up) + parts.get("down_proj_bias", 0.0)
            out[token] += weights[pair] * result
    return out


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def make_linear(codec: str, out_features: int, in_features: int, *, has_bias: bool = False) -> kernels.Linear:
    """A linear of random weights, quantized or in fp32."""
    shape = weight_shape(out_features, in_features)
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    bias = torch.randn(out_features) if has_bias else None
    if codec in ("bf16", "fp32"):
        return kernels.Linear.of_numbers(weight.to({"bf16": torch.bfloat16, "fp32": torch.float32}[codec]), bias)
    coder = get_codec(codec)
    record = coder.encode(shape, {"weight": weight})
    return kernels.Linear(codec=codec, shape=shape, layout=coder.layout(shape), record=record, bias=bias)


def decoded(linear: kernels.Linear) -> Tensor:
    """Its weight ``[O, K]`` in fp64."""
    if linear.record.is_floating_point():
        return linear.record.double()
    return get_codec(linear.codec).decode(linear.shape, linear.record, torch.float32)["weight"].double()
