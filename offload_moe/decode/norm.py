"""RMS norms in one call: of the kernels, or of torch's own function. Layer norms in a kernel call.

Six operations become one. In fp32 torch's results are the same bits; in 16-bit formats it rounds once where the modules
round twice. The kernel's are 1e-6 from them, and those of each row do not depend on how many there are.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload_moe.decode.probe import Refused, agree, answer, probes, structure
from offload_moe.families.read_layer import layer_spec
from offload_moe.families.text_model import TextModel
from offload_moe.native import kernels


class FusedRMSNorm:
    """The forward of one RMS norm module, ``[..., H] -> [..., H]``."""

    def __init__(self, weight: Tensor, eps: float, *, is_exact: bool) -> None:
        """is_exact: only what gives the module's own bits; otherwise fp32 on the CPU is a kernel call."""
        self.weight = weight
        self._shape = list(weight.shape)
        self.eps = eps
        is_plain = weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
        self.kernel = kernels.NormKernel(weight, eps) if is_plain and not is_exact else None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        kernel = self.kernel
        if kernel is not None and hidden_states.dtype == torch.float32 and not hidden_states.requires_grad:
            x = hidden_states.contiguous()
            out = torch.empty_like(x)
            kernel.step(x, out)
            return out
        return functional.rms_norm(hidden_states, self._shape, self.weight, self.eps)


class FusedLayerNorm:
    """The forward of one layer norm with a bias, ``[..., H] -> [..., H]``: in fp32 a kernel call."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._own_forward: Callable[[Tensor], Tensor] = norm.forward
        self.kernel = kernels.NormKernel(norm.weight, norm.eps, norm.bias)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32 or hidden_states.requires_grad:
            return self._own_forward(hidden_states)
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        self.kernel.step(x, out)
        return out


def norm_kernel(norm: nn.Module) -> kernels.NormKernel | None:
    """The kernel call that its forward is, if it is one."""
    forward = vars(norm).get("forward")
    return forward.kernel if isinstance(forward, FusedRMSNorm | FusedLayerNorm) else None


def fuse_norms(model: nn.Module, *, is_exact: bool) -> int:
    """Give every RMS norm of the model the fused forward. Returns how many were recognized."""
    found: dict[Hashable, _Recognized | None] = {}
    num_fused = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if list(module._parameters) != ["weight"] or module.weight.dim() != 1 or list(module.children()):
            continue
        if len(inspect.signature(module.forward).parameters) != 1:  # a gated norm, whose gate may be left out
            continue
        kind = structure(module)
        if kind not in found:
            found[kind] = _recognize(module, module.weight, is_exact=is_exact)
        norm = found[kind]
        if norm is not None:
            module.forward = norm.fused(module.weight, is_exact=is_exact)
            num_fused += 1
    return num_fused


@dataclass(frozen=True, slots=True)
class _Recognized:
    """is_from_one: the weights that count are ``1 + weight``."""

    eps: float
    is_from_one: bool

    def fused(self, weight: Tensor, *, is_exact: bool) -> FusedRMSNorm:
        return FusedRMSNorm(1.0 + weight.detach() if self.is_from_one else weight, self.eps, is_exact=is_exact)


@torch.inference_mode()
def fuse_layer_norms(hf: TextModel) -> int:
    """Make the layer norms of declared layers, and the one behind them, kernel calls. Returns how many."""
    is_same: dict[Hashable, bool] = {}
    num_fused = 0
    for norm in (each for each in _declared_norms(hf.get_decoder()) if _has_kernel(each)):
        fused, kind = FusedLayerNorm(norm), structure(norm)
        if kind not in is_same:
            inputs = probes((3, fused.kernel.length), torch.float32, torch.device("cpu"))
            is_same[kind] = all(_same(norm, fused, x, is_exact=False) for x in inputs)
        if is_same[kind]:
            norm.forward = fused
            num_fused += 1
    return num_fused


def _declared_norms(decoder: Any) -> Iterator[Any]:
    specs = {layer: layer_spec(layer) for layer in getattr(decoder, "layers", ())}
    for layer, spec in specs.items():
        norms = () if spec is None else (spec.before_attention, spec.before_mlp)
        yield from (layer.get_submodule(norm.path) for norm in norms if norm is not None)
    if any(specs.values()):
        yield getattr(decoder, "norm", None)


def _has_kernel(norm: Any) -> bool:
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        return False
    return norm.weight.dim() == 1 and all(p.dtype == torch.float32 and p.is_cpu for p in norm.parameters())


@torch.inference_mode()
def _recognize(module: nn.Module, weight: Tensor, *, is_exact: bool) -> _Recognized | None:
    """Sums with one are made where a kernel reads them: in bf16 they would be rounded."""
    inputs = probes((3, len(weight)), weight.dtype, weight.device)
    has_kernel = not is_exact and weight.dtype == torch.float32 and weight.is_cpu
    epsilons = [value for value in vars(module).values() if isinstance(value, float)]
    for each in (_Recognized(eps, is_from_one) for eps in epsilons for is_from_one in (False, True)[: 1 + has_kernel]):
        fused = each.fused(weight, is_exact=is_exact)
        if all(_same(module, fused, x, is_exact=is_exact) for x in (*inputs, *(part[:1] for part in inputs))):
            return each
    return None


def _same(module: nn.Module, fused: FusedRMSNorm | FusedLayerNorm, x: Tensor, *, is_exact: bool) -> bool:
    try:
        expected = answer(module.forward, x)
    except Refused:  # such as a gated norm, which takes more than a hidden state
        return False
    return isinstance(expected, Tensor) and agree(fused(x), expected, is_exact=is_exact)
