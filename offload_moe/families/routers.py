"""The router in front of an experts module: one look-up for lookahead, profiles and the fast path."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.families.layer_reference import route
from offload_moe.families.layer_spec import RouterSpec
from offload_moe.families.read_layer import layer_spec

ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRouter:
    """A router and its decoder layer. spec: paths are below `layer`; None where the layer's class is not declared."""

    module: nn.Module
    layer: nn.Module
    spec: RouterSpec | None
    config: Any

    @property
    def is_sigmoid(self) -> bool:
        """Whether scores are sigmoids of the logits; of routers that are not declared, as their config has it."""
        if self.spec is not None:
            return self.spec.scoring == "sigmoid"
        scoring = getattr(self.config, "scoring_func", None) or getattr(self.config, "score_function", None)
        return scoring == "sigmoid" or hasattr(self.module, "e_score_correction_bias")

    @torch.no_grad()
    def routes_alone(self, rows: Tensor) -> bool:
        """Whether expert ids follow from hidden states ``[T, H]`` alone: by its declaration, or from the module itself.

        Some modules also take a correction, which their block has.
        """
        if self.spec is not None:
            return True
        try:
            self.module(rows)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # an input is missing
            return False
        return True

    def choose(self, rows: Tensor) -> Tensor:
        """``[T, H]`` -> ids ``[T, K]``, each token's likeliest first. Only for a declared router."""
        assert self.spec is not None
        return route(self.layer, self.spec, rows)[1]


def find_router(hf: nn.Module, block_name: str) -> BlockRouter | None:
    """The child of an MoE block that routes for its experts, where the family has one."""
    module = next(
        (child for name, child in hf.get_submodule(block_name).named_children() if name in ROUTER_NAMES), None
    )
    if module is None:
        return None
    layer = hf.get_submodule(block_name.rpartition(".")[0])
    spec = layer_spec(layer)
    return BlockRouter(
        module=module, layer=layer, spec=None if spec is None else spec.router, config=getattr(hf, "config", None)
    )


def declared_routers(model: nn.Module) -> dict[nn.Module, RouterSpec]:
    """The routers of all declared layers."""
    found = {}
    for layer in model.modules():
        spec = layer_spec(layer)
        if spec is not None and spec.router is not None:
            found[layer.get_submodule(spec.router.path)] = spec.router
    return found
