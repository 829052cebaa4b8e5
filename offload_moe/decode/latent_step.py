"""A decode step of latent attention as one kernel call, made from its declaration.

H hidden, N heads, K unrotated, P rotated and V value dims, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.dense import NarrowLinear, QuantLinear, number_linear
from offload_moe.decode.latent import KeptLatents
from offload_moe.decode.probe import Uncovered
from offload_moe.decode.step import CachedStep, is_fp32, quantized_linear, rotation_of
from offload_moe.errors import ConfigError
from offload_moe.families.layer_spec import AttentionSpec, LatentSpec, NormSpec
from offload_moe.native import kernels


class LatentStep(CachedStep):
    """One token of one sequence in fp32, over a cache of latents and rotated keys."""

    def __init__(self, layer: int, kernel: kernels.LatentKernel, *, rank: int, rotated_dims: int) -> None:
        super().__init__(layer, ((1, rank), (1, rotated_dims)), kernel.cache_dtype)
        self.kernel = kernel


def latent_step(layer: nn.Module, spec: AttentionSpec, cache_dtype: torch.dtype) -> LatentStep:
    """The step of a layer's attention. cache_dtype: of latents and rotated keys.

    Raises: Uncovered where a part is not one that the kernel takes.
    """
    latent, module = spec.latent, layer.get_submodule(spec.path)
    assert latent is not None
    if not isinstance(vars(module).get("expand_kv"), KeptLatents):
        raise Uncovered("latent attention whose latents are expanded")
    names = ("q_a_proj", "q_b_proj") if latent.query_rank else ("q_proj",)
    linears: list[Any] = [module.get_submodule(name) for name in (*names, "kv_a_proj_with_mqa", "o_proj")]
    orders = {linear.in_panels for linear in linears if isinstance(linear, QuantLinear)}
    if len(orders) != 1:
        raise Uncovered("attention whose parts are computed in several ways")
    *query, compress, output = (_linear(linear) for linear in linears)
    weight: Tensor = module.get_submodule("kv_b_proj").weight  # type: ignore[assignment]
    assert spec.key_norm is not None
    try:
        kernel = kernels.LatentKernel(
            query=query,
            compress=compress,
            inner=number_linear(_keys_to_latents(weight.detach(), latent)),
            expand=number_linear(weight.detach()),
            output=output,
            query_norm=_norm(layer, spec.query_norm) if latent.query_rank else None,
            latent_norm=_norm(layer, spec.key_norm),
            rotated_dims=spec.rotated_dims,
            scaling=spec.scaling,
            rotation=rotation_of(spec),
            cache_dtype=cache_dtype,
        )
    except ConfigError as error:
        raise Uncovered(f"latent attention of sizes without a kernel ({str(error).rstrip('.')})") from error
    index: int = module.layer_idx  # type: ignore[assignment]
    return LatentStep(index, kernel, rank=latent.key_value_rank, rotated_dims=spec.rotated_dims)


def _linear(module: nn.Module) -> kernels.Linear:
    if not isinstance(module, nn.Linear | NarrowLinear):
        return quantized_linear(module)
    if not module.weight.is_cpu or not is_fp32(module.bias):
        raise Uncovered("attention whose projections are in another dtype or on another device")
    return number_linear(module.weight.detach(), module.bias)


def _keys_to_latents(weight: Tensor, latent: LatentSpec) -> Tensor:
    """``[N * (K + V), R]`` -> each head's ``W_k`` transposed, ``[N * R, K]``."""
    per_head = weight.view(-1, latent.unrotated_dims + latent.value_dims, latent.key_value_rank)
    return per_head[:, : latent.unrotated_dims].transpose(1, 2).reshape(-1, latent.unrotated_dims)


def _norm(layer: nn.Module, spec: NormSpec | None) -> kernels.HeadNorm:
    assert spec is not None
    weight: Tensor = layer.get_submodule(spec.path).weight  # type: ignore[assignment]
    if not is_fp32(weight) or not weight.is_cpu:
        raise Uncovered("latent attention with norms in another dtype")
    return kernels.HeadNorm(weight=weight.detach(), epsilon=spec.epsilon)
