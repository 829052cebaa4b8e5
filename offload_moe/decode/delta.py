"""Linear attention by gated delta rules: a decode step behind its projections in one native call.

torch's operators go through a layer's state five times and make a new tensor of it each time. Prompts, batches and
what is not fp32 on the CPU take the module's own forward. States are the cache's, and written in place by both.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from offload_moe.decode.hooks import Bypass
from offload_moe.decode.probe import Refused, agree, answer, structure
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import states_in, with_states
from offload_moe.native.kernels import DeltaKernel, Projected

NUM_PROMPT, NUM_STEPS = 5, 2  # tokens of a check
TOLERANCE = 1e-4  # relative: states are sums over all earlier tokens
SILU = ("silu", "swish")
SIZES = ("hidden_size", "conv_kernel_size", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
PARTS = ("A_log", "dt_bias", "conv1d", "norm", "out_proj", "activation", "layer_idx", *SIZES)
PROJECTIONS = (("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNumbers:
    """Of a module, as `DeltaKernel` takes them: fp32, contiguous, where the module is."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    decays: Tensor
    time_biases: Tensor


def numbers_of(module: Any) -> DeltaNumbers:
    """Exponentials are the CPU's, wherever the module is."""
    conv, rates = module.conv1d, module.A_log.detach()
    return DeltaNumbers(
        conv_weight=conv.weight.detach().float().squeeze(1).contiguous(),
        conv_bias=None if conv.bias is None else conv.bias.detach().float(),
        decays=-rates.float().cpu().exp().to(rates.device),
        time_biases=module.dt_bias.detach().float().contiguous(),
    )


class DeltaForward:
    """The forward of one module, ``[B, S, hidden] -> [B, S, hidden]``."""

    def __init__(self, module: Any) -> None:
        """Keep the module's own forward for what the kernel does not take.

        Raises: ConfigError where the kernel does not take its sizes, its activation or its dtype.
        """
        self._module, self._forward = module, module.forward
        self._project = _projection_of(module)
        weight = module.conv1d.weight
        if module.activation not in SILU or weight.dtype != torch.float32 or not weight.is_cpu:
            raise ConfigError("The kernel takes SiLU, and fp32 on the CPU.")
        numbers = numbers_of(module)
        self.kernel = DeltaKernel(
            conv_weight=numbers.conv_weight,
            conv_bias=numbers.conv_bias,
            decays=numbers.decays,
            time_biases=numbers.time_biases,
            norm=module.norm.weight.detach().float().contiguous(),
            num_key_heads=module.num_k_heads,
            key_dim=module.head_k_dim,
            epsilon=module.norm.variance_epsilon,
        )
        self._num_out = module.num_v_heads * module.head_v_dim
        self._bypass = Bypass([module.conv1d, module.norm], ())

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_step = _is_step(hidden_states) and self._bypass.is_clear
        states = self.states(states_in(args, kwargs)) if is_step else None
        if states is None:
            return self._forward(hidden_states, *args, **kwargs)
        out = torch.empty(1, 1, self._num_out)
        self.kernel.step(self._project(hidden_states), *states, out)
        return self._module.out_proj(out)

    def states(self, cache: Any) -> tuple[Tensor, Tensor] | None:
        """Inputs of the convolution and the state, where the kernel may move them on by one token."""
        layers, index = getattr(cache, "layers", ()), self._module.layer_idx
        layer = layers[index] if index < len(layers) else None
        if (
            not isinstance(layer, LinearAttentionCacheLayerMixin)
            or layer.record_past
            or not layer.has_previous_state[0]
        ):
            return None
        inputs, state = layer.conv_states[0], layer.recurrent_states[0]
        if inputs is None or state is None or not _is_in_place(inputs) or not _is_in_place(state):
            return None
        return (inputs, state) if inputs.shape[-1] == self._module.conv_kernel_size else None


def _is_step(x: Tensor) -> bool:
    return x.shape[:2] == (1, 1) and x.dtype == torch.float32 and x.is_cpu and not x.requires_grad


def _is_in_place(state: Tensor) -> bool:
    """Whether the kernel may write to what a cache holds of one sequence."""
    return len(state) == 1 and state.dtype == torch.float32 and state.is_cpu and state.is_contiguous()


def fuse_delta_rules(model: nn.Module) -> int:
    """Give every layer of gated delta rules whose numbers agree the native step. Returns how many were recognized."""
    agrees: dict[Hashable, bool] = {}
    modules: list[Any] = [module for module in model.modules() if _is_candidate(module)]
    num_fused = 0
    for module in modules:
        kind = structure(module)
        if kind not in agrees:
            agrees[kind] = _agrees(module)
        if agrees[kind]:
            module.forward = DeltaForward(module)
            num_fused += 1
    return num_fused


def _is_candidate(module: Any) -> bool:
    """Whether it has the parts of a layer of gated delta rules; what they compute is checked later."""
    return (
        all(hasattr(module, name) for name in PARTS)
        and any(all(hasattr(module, name) for name in names) for names in PROJECTIONS)
        and hasattr(module.norm, "weight")
        and hasattr(module.norm, "variance_epsilon")
    )


def projection_names(module: Any) -> tuple[str, ...]:
    """Of its input, as `DeltaKernel.places` takes them."""
    return next(names for names in PROJECTIONS if hasattr(module, names[0]))


def _projection_of(module: Any) -> Callable[[Tensor], Projected]:
    if hasattr(module, "in_proj_qkvz"):
        return lambda x: Projected(mixed=module.in_proj_qkvz(x), strengths=module.in_proj_ba(x))
    return lambda x: Projected(
        mixed=module.in_proj_qkv(x),
        gates=module.in_proj_z(x),
        strengths=module.in_proj_b(x),
        times=module.in_proj_a(x),
    )


@torch.inference_mode()
def _agrees(module: Any) -> bool:
    """Whether some steps behind a prompt give the module's own results and states."""
    try:
        fused = DeltaForward(module)
    except ConfigError:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_PROMPT + NUM_STEPS, module.hidden_size, generator=generator)
    caches = [empty_cache(module), empty_cache(module)]
    try:
        expected = _results(module.forward, x, caches[0], module.layer_idx)
        got = _results(fused, x, caches[1], module.layer_idx)
    except Refused:
        return False
    return all(agree(*pair, is_exact=False, tolerance=TOLERANCE) for pair in zip(got, expected, strict=True))


def empty_cache(module: Any) -> Cache:
    """With layers up to this module's."""
    return Cache(layers=[LinearAttentionLayer() for _ in range(module.layer_idx + 1)])


def _results(forward: Callable[..., Any], x: Tensor, cache: Any, index: int) -> list[Tensor]:
    """Of a prompt and the steps behind it, and the states at the end."""
    pieces = [x[:NUM_PROMPT], *x[NUM_PROMPT:].split(1)]
    found = [answer(forward, piece[None], **with_states(cache)) for piece in pieces]
    return [*found, cache.get_conv_state(index, state_idx=0), cache.get_recurrent_state(index, state_idx=0)]
