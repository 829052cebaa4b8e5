"""The native call of a router."""

import ctypes

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.attention import Linear, optional_address
from offload_moe.native.bindings import library
from offload_moe.native.constants import MAX_SCORED
from offload_moe.native.structs import RouterStruct


class RouterKernel:
    """Logits, scores and top-k of some tokens, in fp32. Shape legend: T tokens, H hidden, E experts, K top-k."""

    def __init__(
        self,
        linear: Linear,
        *,
        top_k: int,
        is_of_chosen: bool,
        is_sigmoid: bool = False,
        correction: Tensor | None = None,
        num_groups: int = 1,
        num_chosen_groups: int = 1,
        num_best: int = 1,
        jitter: float | None = None,
        scale: float = 1.0,
    ) -> None:
        """Settings as in `RouterSpec`; scores are a softmax unless `is_sigmoid`, or `jitter` makes it a sparse mixer.

        is_of_chosen: weights are shares among the K chosen experts' scores, otherwise their scores.
        correction: fp32 ``[E]``, added to the scores for the choice only. num_best: scores of a group that are added up
        for the group's.

        Raises: ConfigError when the kernel lacks such a router.
        """
        num_experts = linear.shape.matrices[0].out_features
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"A router of {num_experts} experts cannot choose {top_k}.")
        has_groups = num_chosen_groups < num_groups
        if num_experts % num_groups or (has_groups and top_k > num_experts // num_groups * num_chosen_groups):
            groups = f"{num_chosen_groups} of {num_groups} groups"
            raise ConfigError(f"A router of {num_experts} experts cannot choose {top_k} in {groups}.")
        is_mixer = jitter is not None
        scores_all = has_groups or is_mixer or correction is not None or not (is_sigmoid or is_of_chosen)
        if num_experts > MAX_SCORED and scores_all:
            raise ConfigError(f"The router kernel scores no more than {MAX_SCORED} experts, not {num_experts}.")
        self._owned = (linear, correction)
        self._struct = RouterStruct(
            matrix=linear.struct(),
            record=linear.record.data_ptr(),
            bias=optional_address(linear.bias),
            correction=optional_address(correction),
            top_k=top_k,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            num_best=num_best,
            is_sigmoid=is_sigmoid,
            is_of_chosen=is_of_chosen,
            is_mixer=is_mixer,
            jitter=jitter or 0.0,
            scale=scale,
        )
        self.num_experts, self.top_k = num_experts, top_k
        self._hidden = linear.shape.matrices[0].in_features
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_router_step

    def step(self, x: Tensor, logits: Tensor, weights: Tensor, ids: Tensor) -> None:
        """Route x ``[T, H]`` to logits ``[T, E]``, weights ``[T, K]``, all fp32, and ids ``[T, K]`` int64.

        Contiguous, not checked, this is the hot path. Raises: MemoryError.
        """
        results = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        status = self._native(self.struct_address, x.data_ptr(), x.numel() // self._hidden, *results)
        if status:
            raise MemoryError("No memory for a router's activations.")
