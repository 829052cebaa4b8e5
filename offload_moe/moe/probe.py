"""A layer's router behind that layer's norm, asked with the residual state of an earlier layer."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.overlooked import ROUTER_NAMES

NORM_NAMES = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "norm2")


class RouterProbe:
    """Callable on a residual state that is not its layer's own."""

    def __init__(self, norm: nn.Module, router: nn.Module) -> None:
        self.norm = norm
        self._router = router

    def predict(self, residual: Tensor, num_experts_per_token: int) -> list[int]:
        """Residual ``[T, H]`` -> distinct expert ids; the likeliest first where T is 1."""
        out: Any = self._router(self.norm.forward(residual))
        parts = out if isinstance(out, tuple) else (out,)
        ids = next((part for part in parts if isinstance(part, Tensor) and not part.is_floating_point()), None)
        if ids is None:
            scores = parts[0]
            bias = getattr(self._router, "e_score_correction_bias", None)
            if bias is not None:
                scores = scores.sigmoid() + bias
            ids = scores.topk(num_experts_per_token, dim=-1).indices
        return list(dict.fromkeys(ids.flatten().tolist()))


class ResidualKeeper:
    """A forward pre-hook of a layer's norm that keeps what it is given, ``[T, H]``, and changes nothing."""

    def __init__(self, residuals: MutableMapping[int, Tensor], layer: int) -> None:
        self._residuals, self._layer = residuals, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._residuals[self._layer] = args[0].reshape(-1, args[0].shape[-1])


def find_probes(hf: nn.Module, layers: Sequence[ExpertsModule]) -> list[RouterProbe | None]:
    """The norm and the router in front of each experts module, where the family has them in the usual places."""
    return [_find_probe(hf, layer.block_name) for layer in layers]


def _find_probe(hf: nn.Module, block_name: str) -> RouterProbe | None:
    block, decoder_layer = hf.get_submodule(block_name), hf.get_submodule(block_name.rpartition(".")[0])
    router = next((child for name, child in block.named_children() if name in ROUTER_NAMES), None)
    norms = dict(decoder_layer.named_children())
    norm = next((norms[name] for name in NORM_NAMES if name in norms), None)
    return RouterProbe(norm, router) if router is not None and norm is not None else None
