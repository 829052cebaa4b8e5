"""Lookahead: the next MoE layers' own routers, asked with the hidden state of this layer.

The residual stream changes slowly from layer to layer, so what a later router would choose now is a good guess of what
it will choose. The guess is made after a layer's demands are on their way and before its experts are computed.

Source: Eliseev and Mazur 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", section 3.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.overlooked import ROUTER_NAMES
from offload_moe.schedule.prefetch import PrefetchGovernor
from offload_moe.schedule.scheduler import Scheduler

NORM_NAMES = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "norm2")
TOLERANCE = 1e-3
DEFAULT_DEPTH = 2


class RouterProbe:
    """One layer's router behind that layer's norm, callable on a residual state that is not its own."""

    def __init__(self, norm: nn.Module, router: nn.Module) -> None:
        self.norm = norm
        self._router = router

    def predict(self, residual: Tensor, num_experts_per_token: int) -> list[int]:
        """Residual ``[T, H]`` -> distinct expert ids."""
        out: Any = self._router(self.norm.forward(residual))
        parts = out if isinstance(out, tuple) else (out,)
        ids = next((part for part in parts if isinstance(part, Tensor) and not part.is_floating_point()), None)
        if ids is None:
            scores = parts[0]
            bias = getattr(self._router, "e_score_correction_bias", None)
            if bias is not None:
                scores = scores.sigmoid() + bias
            ids = scores.topk(num_experts_per_token, dim=-1).indices
        return sorted(set(ids.flatten().tolist()))


class Lookahead:
    """Prefetches for one model. A layer whose router cannot be asked this way is left out."""

    def __init__(
        self, probes: Sequence[RouterProbe | None], scheduler: Scheduler, governor: PrefetchGovernor, depth: int
    ) -> None:
        """probes: one per MoE layer. depth: how many layers ahead."""
        self._probes = probes
        self._scheduler = scheduler
        self._depth = depth
        self.governor = governor
        self._is_on = False
        self._residuals: dict[int, Tensor] = {}
        self._trusted: dict[int, bool] = {}
        for layer, probe in enumerate(probes):
            if probe is not None:
                probe.norm.register_forward_pre_hook(self._keeper(layer))

    def after_acquire(self, layer: int, hidden: Tensor, experts: Sequence[int], num_experts_per_token: int) -> None:
        """Guess and prefetch for the layers behind `layer`; hidden ``[T, H]`` is what its experts are given."""
        residual = self._residuals.pop(layer, None)
        if len(hidden) != 1:
            self.governor.pause()
            return
        if layer == 0:
            self._is_on = self.governor.begin_token()
        if not self._is_on or residual is None or not self._is_trusted(layer, residual, hidden):
            return
        keep = {layer * self._scheduler.num_experts + expert for expert in experts}
        for ahead in range(layer + 1, min(layer + 1 + self._depth, len(self._probes))):
            probe = self._probes[ahead]
            if probe is not None and self._trusted.get(ahead, True):
                guessed = probe.predict(residual, num_experts_per_token)
                self._scheduler.prefetch(ahead, guessed, keep)
                keep |= {ahead * self._scheduler.num_experts + expert for expert in guessed}

    def _is_trusted(self, layer: int, residual: Tensor, hidden: Tensor) -> bool:
        """Whether the norm we found is the one before these experts: checked once, by its result."""
        if layer not in self._trusted:
            probe = self._probes[layer]
            assert probe is not None
            normed = probe.norm.forward(residual)
            self._trusted[layer] = torch.allclose(normed, hidden, rtol=TOLERANCE, atol=TOLERANCE)
        return self._trusted[layer]

    def _keeper(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel() == args[0].shape[-1]:
                self._residuals[layer] = args[0].reshape(1, -1)

        return keep


def find_probes(hf: nn.Module, layers: Sequence[ExpertsModule]) -> list[RouterProbe | None]:
    """The norm and the router in front of each experts module, where the family has them in the usual places."""
    return [_find_probe(hf, layer.block_name) for layer in layers]


def _find_probe(hf: nn.Module, block_name: str) -> RouterProbe | None:
    block, decoder_layer = hf.get_submodule(block_name), hf.get_submodule(block_name.rpartition(".")[0])
    router = next((child for name, child in block.named_children() if name in ROUTER_NAMES), None)
    norms = dict(decoder_layer.named_children())
    norm = next((norms[name] for name in NORM_NAMES if name in norms), None)
    return RouterProbe(norm, router) if router is not None and norm is not None else None
