"""The native call for rows of an embedding."""

from typing import Any

import torch
from torch import Tensor

from offload_moe.native.bindings import library
from offload_moe.native.constants import CODECS

_CODECS = {torch.float32: CODECS["fp32"], torch.bfloat16: CODECS["bf16"]}


class EmbeddingKernel:
    """Rows of the weight of a module, scaled, in fp32."""

    def __init__(self, module: Any, scale: float) -> None:
        """module: with a weight ``[V, H]``, which may be replaced."""
        self._module, self._scale = module, scale
        self._native = library().om_embed

    def rows(self, ids: Tensor) -> Tensor | None:
        """Of ids ``[1, T]`` -> ``[1, T, H]``; None where only the module's own operation will do."""
        weight: Tensor = self._module.weight
        codec = _CODECS.get(weight.dtype)
        is_plain = weight.is_cpu and weight.is_contiguous() and not (weight.requires_grad and torch.is_grad_enabled())
        if codec is None or not is_plain or ids.dtype != torch.int64 or not ids.is_cpu or not ids.is_contiguous():
            return None
        x = torch.empty(*ids.shape, weight.shape[1])
        table = (weight.data_ptr(), codec, *weight.shape)
        return None if self._native(*table, ids.data_ptr(), ids.numel(), self._scale, x.data_ptr()) else x
