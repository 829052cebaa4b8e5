"""A decode step of linear attention as one kernel call."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from offload_moe.decode.delta import DeltaForward, empty_cache, projection_names
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.probe import Uncovered, answer, probes
from offload_moe.decode.states import StatesLayer
from offload_moe.decode.step import is_fp32
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import with_states
from offload_moe.native import kernels


class DeltaStep:
    """Tokens of one sequence, which move the states in its layer of a cache on."""

    takes_prompts = False

    def __init__(self, module: Any, forward: DeltaForward, kernel: kernels.LinearAttentionKernel) -> None:
        self.kernel = kernel
        self._module, self._forward = module, forward

    def takes(self, cache: Any, window: int | None, num_tokens: int) -> bool:
        """Whether the cache has states behind which it can take the next tokens."""
        return self._forward.states(cache) is not None

    def places(self, cache: Any, num_tokens: int = 1) -> list[int]:
        """The fields of `rooms_array`."""
        layer = cache.layers[self._module.layer_idx]
        if isinstance(layer, StatesLayer):
            return layer.places(num_tokens)
        return kernels.state_places(*self.kept(cache), [(0, 0)] * num_tokens)

    def begin(self, cache: Any) -> None:
        """States come with a prompt, which its module takes."""

    def trim(self, cache: Any) -> None:
        """They have a fixed size."""

    def kept(self, cache: Any) -> tuple[Tensor, Tensor]:
        """The inputs of the convolution and the state."""
        states = self._forward.states(cache)
        assert states is not None
        return states

    def probe_cache(self, num_tokens: int) -> Cache:
        """The states behind a random prompt, on the CPU."""
        (prompt, *_) = probes((1, num_tokens, self._module.hidden_size), torch.float32, torch.device("cpu"), seed=1)
        cache = empty_cache(self._module)
        answer(self._forward, prompt, **with_states(cache))
        return cache


def delta_step(module: Any) -> DeltaStep:
    """The step of this module. Raises: Uncovered where a part is not one that the kernel takes."""
    forward = vars(module).get("forward")
    if not isinstance(forward, DeltaForward):
        raise Uncovered("linear attention whose rule is not a kernel call")
    inputs = [_linear(getattr(module, name)) for name in projection_names(module)]
    try:
        kernel = kernels.LinearAttentionKernel(forward.kernel, inputs, _linear(module.out_proj))
    except ConfigError as error:
        raise Uncovered("linear attention whose projections have biases") from error
    return DeltaStep(module, forward, kernel)


def _linear(module: nn.Module) -> kernels.Linear:
    """Numbers stay where they are: in fp32."""
    if isinstance(module, QuantLinear) and module.has_kernel:
        return module.as_projection()
    if type(module) is not nn.Linear or not module.weight.is_cpu or not is_fp32(module.weight):
        raise Uncovered("linear attention whose projections are in a codec without a kernel, or not in fp32 on the CPU")
    return kernels.Linear.of_numbers(module.weight.detach(), module.bias)
