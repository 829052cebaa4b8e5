"""Attention of a module over a cache in bf16, by the kernel of decode steps: it reads the cache as it lies.

Each token has the bits that it has alone, so that results do not depend on how a prompt is cut into chunks.

Shapes: N query heads, M key/value heads, T new tokens, S all that they may see, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from offload_moe.decode.hooks import is_capturing
from offload_moe.decode.probe import Uncovered
from offload_moe.decode.step import CachedStep, is_fp32
from offload_moe.errors import ConfigError
from offload_moe.native import kernels

HIDDEN = -1e30  # what is added to a score less than this hides it


class CacheAttention(CachedStep):
    """Attention of one sequence in fp32 over what this layer of a cache holds, and the new tokens themselves."""

    def __init__(self, attention: Any) -> None:
        """Of an attention module. Raises: Uncovered where the kernel does not take its heads."""
        num_heads, num_kv_heads = (
            linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)
        )
        super().__init__(attention.layer_idx, ((num_kv_heads, attention.head_dim),) * 2, torch.bfloat16)
        sinks = getattr(attention, "sinks", None)
        if not is_fp32(sinks) or not (sinks is None or sinks.is_cpu):
            raise Uncovered("attention with sinks in another dtype or on another device")
        try:
            self._kernel = kernels.AttendKernel(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=attention.head_dim,
                scaling=attention.scaling,
                sinks=None if sinks is None else sinks.detach(),
                cache_dtype=self.cache_dtype,
            )
        except ConfigError as error:
            raise Uncovered("attention of sizes without a kernel") from error
        self._window: int | None = getattr(attention, "sliding_window", None)
        self._config = attention.config
        self._function = attention.config._attn_implementation

    def fits(self, hidden: Tensor, mask: Tensor | None, cache: Any) -> bool:
        """Whether each of the tokens ``[1, T, H]`` sees those before it, or its window of them.

        mask: ``[1, 1, T, S]``, boolean or added to scores; None: as attention functions take it.
        """
        num_new = hidden.shape[1]
        is_plain = len(hidden) == 1 and hidden.dtype == torch.float32 and hidden.is_cpu and not hidden.requires_grad
        if not is_plain or is_capturing() or self._config._attn_implementation != self._function:
            return False
        if num_new > 1 and cache is not None:
            self.begin(cache)
        if not hasattr(cache, "layers") or not self.takes(cache, self._window, num_new):
            return False
        num_cached = cache.layers[self._layer].keys.shape[2]
        if mask is None:
            return num_new == 1 or num_cached == 0
        return _is_causal(mask, num_cached, num_new, self._window)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, cache: Any) -> Tensor:
        """query ``[1, N, T, D]``, key and value ``[1, M, T, D]``, which the cache gets -> ``[1, T, N, D]``."""
        num_new = query.shape[2]
        rooms = cache.layers[self._layer].extend(num_new)
        keys, values, length = rooms[0]
        keys[:, :, length : length + num_new] = key
        values[:, :, length : length + num_new] = value
        queries = query.transpose(1, 2).contiguous()
        out = torch.empty_like(queries)
        self._kernel.forward(queries, rooms, out)
        if num_new > kernels.MAX_ROWS:
            self.trim(cache)
        return out


def _is_causal(mask: Tensor, num_cached: int, num_new: int, window: int | None) -> bool:
    """Whether the mask hides from each new token what is behind it, or before its window, and nothing else."""
    if mask.shape != (1, 1, num_new, num_cached + num_new):
        return False
    sees = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((sees | (mask < HIDDEN)).all()):
        return False
    positions = torch.arange(num_cached + num_new)
    distance = positions[num_cached:, None] - positions
    expected = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return torch.equal(sees[0, 0], expected)
