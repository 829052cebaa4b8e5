"""A layer's router behind that layer's norm, asked with the residual state of an earlier layer."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.overlooked import ROUTER_NAMES

NORM_NAMES = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "norm2")

TRIED_TOKENS = 16
LEAST_SAME = 0.95  # of the ids; ties and roundings differ


class RouterProbe:
    """Callable on a residual state that is not its layer's own."""

    def __init__(self, norm: nn.Module, router: nn.Module) -> None:
        self.norm = norm
        self._router = router
        self._is_plain: bool | None = None  # whether norm and router are what `_ask_plainly` computes; None: not tried

    def predict(self, residual: Tensor, num_experts_per_token: int) -> list[int]:
        """Residual ``[T, H]`` -> distinct expert ids; the likeliest first where T is 1."""
        return list(dict.fromkeys(self.ask(residual, num_experts_per_token).flatten().tolist()))

    def ask(self, residual: Tensor, num_experts_per_token: int) -> Tensor:
        """Residual ``[T, H]`` -> expert ids ``[T, K]`` where the residual is; each token's likeliest first."""
        if self._is_plain is None:
            self._is_plain = self._is_recognized(residual, num_experts_per_token)
        if self._is_plain:
            return self._ask_plainly(residual, num_experts_per_token)
        return self._ask_modules(residual, num_experts_per_token)

    def _ask_modules(self, residual: Tensor, k: int) -> Tensor:
        out: Any = self._router(self.norm.forward(residual))
        parts = out if isinstance(out, tuple) else (out,)
        ids = next((part for part in parts if isinstance(part, Tensor) and not part.is_floating_point()), None)
        if ids is not None:
            return ids
        scores = parts[0]
        bias = getattr(self._router, "e_score_correction_bias", None)
        if bias is not None:
            scores = scores.sigmoid() + bias
        return scores.topk(k, dim=-1).indices

    def _ask_plainly(self, residual: Tensor, k: int) -> Tensor:
        """An RMS norm and the greatest logits, in three operations: modules take a dozen and more for the same ids."""
        router: Any = self._router
        norm: Any = self.norm
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        normed = F.rms_norm(residual, residual.shape[-1:], norm.weight, eps)
        return F.linear(normed, router.weight, getattr(router, "bias", None)).topk(k, dim=-1).indices

    def _is_recognized(self, residual: Tensor, k: int) -> bool:
        """Found by trying, on noise as large as the residual: most ids have to be the same."""
        if "forward" in vars(self._router):
            return False  # it has a short step of its own
        generator = torch.Generator(residual.device).manual_seed(0)
        noise = torch.randn(TRIED_TOKENS, residual.shape[-1], generator=generator, device=residual.device)
        tried = (noise * residual.float().std()).to(residual.dtype)
        try:
            expected, found = self._ask_modules(tried, k), self._ask_plainly(tried, k)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        if expected.shape != found.shape:
            return False
        num_same = (expected[..., None] == found[..., None, :]).sum()
        return bool(num_same >= LEAST_SAME * expected.numel())


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
