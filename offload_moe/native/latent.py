"""The native call of latent attention."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.attention import HeadNorm, Linear, optional_address
from offload_moe.native.bindings import library
from offload_moe.native.constants import DIM_STEP, MAX_ROTATED, ROTATIONS
from offload_moe.native.planes import DTYPES, VALUES
from offload_moe.native.rooms import Rooms, rooms_array
from offload_moe.native.structs import LatentStruct, MatrixStruct


class LatentKernel:
    """Projections, norms, rotary embedding, cache, attention and output projection of some tokens, in fp32.

    Each row's bits are those of a call of it alone. Shape legend: T rows, H hidden, N heads, K unrotated, P rotated and
    V value dims, R rank, Q rank of the query, C room in the cache. Source: DeepSeek-V2, arXiv:2405.04434.

    cache_dtype: of latents and rotated keys.
    """

    def __init__(
        self,
        *,
        query: Sequence[Linear],
        compress: Linear,
        inner: Linear,
        expand: Linear,
        output: Linear,
        query_norm: HeadNorm | None,
        latent_norm: HeadNorm,
        rotated_dims: int,
        scaling: float,
        rotation: str,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Settings of one layer. Matrices are ``[out, in]``.

        query: ``[N * (K + P), H]``, or ``[Q, H]`` and ``[N * (K + P), Q]`` with `query_norm` between them.
        compress: ``[R + P, H]``.
        inner, expand: keys to latents ``[N * R, K]``, latents to keys and values ``[N * (K + V), R]``: plain numbers.
        output: ``[H, N * V]``. rotation: a key of `ROTATIONS`. cache_dtype: of latents and rotated keys, fp32 or bf16.

        Raises: ConfigError when the kernel lacks these dims or codecs.
        """
        rank, unrotated = latent_norm.weight.numel(), inner.shape.matrices[0].in_features
        num_heads = inner.shape.matrices[0].out_features // rank
        value_dims = output.shape.matrices[0].in_features // num_heads
        if rank % DIM_STEP or rotated_dims % DIM_STEP or rotated_dims > MAX_ROTATED:
            raise ConfigError(f"The latent attention kernel takes no rank of {rank} with {rotated_dims} rotated dims.")
        expected = {
            "query": (query[-1], num_heads * (unrotated + rotated_dims)),
            "compress": (compress, rank + rotated_dims),
            "inner": (inner, num_heads * rank),
            "expand": (expand, num_heads * (unrotated + value_dims)),
        }
        for name, (linear, features) in expected.items():
            if linear.shape.matrices[0].out_features != features:
                got = linear.shape.matrices[0].out_features
                raise ConfigError(f"The projection {name} of latent attention has {got} features, not {features}.")
        if inner.codec not in VALUES or expand.codec not in VALUES:
            raise ConfigError("Projections of latent attention in codecs that its kernel does not take together.")
        if len(query) != 1 + (query_norm is not None):
            raise ConfigError("A norm of the query needs two projections, one on either side.")
        self.cache_dtype = cache_dtype
        linears = [query[0], compress, query[-1], inner, expand, output]
        self._owned = (linears, query_norm, latent_norm)
        self._struct = LatentStruct(
            matrices=(MatrixStruct * 6)(*(linear.struct() for linear in linears)),
            records=(ctypes.c_void_p * 6)(*(linear.record.data_ptr() for linear in linears)),
            biases=(ctypes.c_void_p * 6)(*(optional_address(linear.bias) for linear in linears)),
            query_norm=None if query_norm is None else query_norm.weight.data_ptr(),
            latent_norm=latent_norm.weight.data_ptr(),
            query_epsilon=0.0 if query_norm is None else query_norm.epsilon,
            latent_epsilon=latent_norm.epsilon,
            num_heads=num_heads,
            unrotated_dims=unrotated,
            rotated_dims=rotated_dims,
            value_dims=value_dims,
            rank=rank,
            scaling=scaling,
            rotation=ROTATIONS[rotation],
            cache_dtype=DTYPES[cache_dtype],
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_latent_step

    def step(self, x: Tensor, cos: Tensor, signed_sin: Tensor, rooms: Rooms, out: Tensor) -> None:
        """Attend: x ``[..., H]`` of T rows -> out ``[..., H]``, fp32, contiguous; not checked, this is the hot path.

        cos, signed_sin ``[T, P]``, in the order of halves. rooms: as of `AttentionKernel.step`: latents
        ``[1, 1, C, R]`` and rotated keys ``[1, 1, C, P]`` in `cache_dtype`. Raises: MemoryError.
        """
        places = rooms_array(rooms)
        status = self._native(
            *(self.struct_address, x.data_ptr(), cos.data_ptr(), signed_sin.data_ptr()),
            *(places.buffer_info()[0], len(places) // 4, out.data_ptr()),
        )
        if status:
            raise MemoryError(f"No memory for the scores of {max(places[3::4]) + 1} tokens.")
