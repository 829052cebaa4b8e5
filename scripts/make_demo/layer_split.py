"""How one feed-forward layer becomes experts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplit:
    """`shared` int64 [S] and `routed` int64 [E, W] are neuron numbers; `router` fp32 [E, H]; `down` fp32 [H, I] is what
    calibration would put in place of the dense `down_proj`.
    """

    shared: Tensor
    routed: Tensor
    router: Tensor
    down: Tensor
