"""The recall of predictions from an earlier layer's hidden state, whether or not prefetch is on.

The trace of a forward has the choices; the same prompt runs once more, and each layer's residual is the input of the
routers of later layers. Depth 0 is a layer's own router: if that does not reproduce its own choice, its input is not
the recorded residual, and the layer is left out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.experts.probe import ResidualCapture, RouterProbe, find_probes
from offload_moe.families.text_model import TextModel
from offload_moe.profile.trace import Trace

DEPTHS = (1, 2, 3)
LEAST_OWN_RECALL = 0.9


def measure_recall(
    hf: TextModel, layers: Sequence[ExpertsModule], forward: Callable[[], Trace]
) -> dict[str, list[float | None]]:
    """Recall by depth: for each layer, the share of its routed experts that were predicted `depth` layers before it.

    forward: runs a prompt once and returns its trace.
    """
    probes = find_probes(hf, layers)
    residuals: dict[int, Tensor] = {}
    handles = [
        probe.norm.register_forward_pre_hook(ResidualCapture(residuals, layer))
        for layer, probe in enumerate(probes)
        if probe is not None
    ]
    try:
        trace = forward()
    finally:
        for handle in handles:
            handle.remove()
    with torch.inference_mode():
        return _recalls(probes, residuals, trace)


def _recalls(
    probes: Sequence[RouterProbe | None], residuals: dict[int, Tensor], trace: Trace
) -> dict[str, list[float | None]]:
    chosen = trace.experts.tolist()
    own = [_recall(probe, residuals.get(layer), chosen, layer) for layer, probe in enumerate(probes)]
    usable = [probe if (own[layer] or 0.0) >= LEAST_OWN_RECALL else None for layer, probe in enumerate(probes)]
    found: dict[str, list[float | None]] = {}
    for depth in DEPTHS:
        found[str(depth)] = [
            _recall(probe, residuals.get(layer - depth), chosen, layer)
            if layer >= depth and usable[layer - depth]
            # The earlier layer's own probe proves that its residual is the right input.
            else None
            for layer, probe in enumerate(usable)
        ]
    return found


def _recall(
    probe: RouterProbe | None, residual: Tensor | None, chosen: list[list[list[int]]], layer: int
) -> float | None:
    if probe is None or residual is None or len(residual) != len(chosen):
        return None
    num_right = num_routed = 0
    for token, experts in enumerate(chosen):
        guessed = probe.predict(residual[token : token + 1], len(experts[layer]))
        num_right += len(set(guessed) & set(experts[layer]))
        num_routed += len(experts[layer])
    return num_right / num_routed
