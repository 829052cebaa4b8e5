"""Which layers of a store's model decode natively, as far as their declarations say: no weight is read."""

from typing import Any

import torch
from torch import nn

from offload_moe.checkpoint.experts import find_experts
from offload_moe.decode.report import DENSE, decoder_layers, tell_reasons
from offload_moe.doctor.check import Check
from offload_moe.engine.assemble import skeleton_of
from offload_moe.families.limits import layer_limits
from offload_moe.families.read_layer import layer_spec
from offload_moe.store import Store


def check_fast_path(store: Store) -> Check:
    """Never a problem: the slow path computes the same."""
    hf = skeleton_of(store, torch.float32)
    experts = {hf.get_submodule(layer.block_name) for layer in find_experts(hf)}

    def has_experts(layer: nn.Module) -> bool:
        return any(module in experts for module in layer.modules())

    layers = [layer for _, layer in decoder_layers(hf, has_experts)]
    reasons = [_reasons(layer) for layer in layers]
    if not any(has_experts(layer) and not whys for layer, whys in zip(layers, reasons, strict=True)):
        reasons = [whys or DENSE for whys in reasons]  # there is no span that they could join
    slow = [each for each in reasons if each]
    whys = f"; slow path: {tell_reasons(slow)}" if slow else ""
    found = f"{len(reasons) - len(slow)} of {len(reasons)} layers decode natively on the CPU{whys}"
    return Check(name="fast path", verdict="ok", found=found)


def _reasons(layer: Any) -> tuple[str, ...]:
    spec = layer_spec(layer)
    if spec is None:
        return (f"a class that is not declared ({type(layer).__name__}), which is for `load` to find out",)
    return tuple(layer_limits(spec))
