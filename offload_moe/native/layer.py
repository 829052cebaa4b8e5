"""The native call of a layer, up to its experts."""

import ctypes

from torch import Tensor

from offload_moe.native.attention import AttentionKernel, NormKernel
from offload_moe.native.bindings import library
from offload_moe.native.latent import LatentKernel
from offload_moe.native.linear_attention import LinearAttentionKernel
from offload_moe.native.rooms import Rooms, rooms_array
from offload_moe.native.router import RouterKernel
from offload_moe.native.structs import LayerStruct


class LayerKernel:
    """A decoder layer up to its experts: norm, attention, residual sum, norm, and router if it has one.

    Gives the bits of the separate calls, and of each row alone. Shape legend: E experts, K top-k; others as in
    `AttentionKernel`.
    """

    def __init__(
        self,
        norms: tuple[NormKernel, NormKernel],
        attention: AttentionKernel | LatentKernel | LinearAttentionKernel,
        router: RouterKernel | None,
        residual_scale: float = 1.0,
    ) -> None:
        """Parts of the layer. norms: before attention, and before the router.

        residual_scale: factor of what attention and experts add.
        """
        self._owned = (norms, attention, router)
        kinds = {"attention": AttentionKernel, "latent": LatentKernel, "linear": LinearAttentionKernel}
        self._struct = LayerStruct(
            **{name: attention.struct_address for name, kind in kinds.items() if isinstance(attention, kind)},
            router=None if router is None else router.struct_address,
            norms=(ctypes.c_void_p * 2)(*(norm.weight_address for norm in norms)),
            norm_biases=(ctypes.c_void_p * 2)(*(norm.bias_address for norm in norms)),
            epsilons=(ctypes.c_float * 2)(*(norm.epsilon for norm in norms)),
            residual_scale=residual_scale,
            hidden=norms[0].length,
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_layer_step

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        rooms: Rooms,
        residual: Tensor,
        normed: Tensor,
        routed: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        """Compute x ``[..., H]`` of T rows -> residual and normed ``[..., H]``, and the router's results.

        cos, signed_sin, rooms: as of `AttentionKernel.step`. routed: logits, weights and ids as in `RouterKernel`; None
        without a router. All tensors are contiguous; not checked, this is the hot path. Raises: MemoryError.
        """
        places = rooms_array(rooms)
        status = self._native(
            *(self.struct_address, x.data_ptr(), cos.data_ptr(), signed_sin.data_ptr()),
            *(places.buffer_info()[0], len(places) // 4, residual.data_ptr(), normed.data_ptr()),
            *((None, None, None) if routed is None else (part.data_ptr() for part in routed)),
        )
        if status:
            raise MemoryError(f"No memory for the scores of {max(places[3::4]) + 1} tokens.")
