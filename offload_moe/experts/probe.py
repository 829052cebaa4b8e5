"""A layer's router behind that layer's norm, applied to the residual state of an earlier layer."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.errors import ConfigError
from offload_moe.experts.observer import HookObserver
from offload_moe.families.routers import BlockRouter, find_router
from offload_moe.families.text_model import TextModel
from offload_moe.native import kernels

NORM_NAMES = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "norm2")

TRIED_TOKENS = 16
LEAST_SAME = 0.95  # share of the ids; ties and roundings differ

Route = Callable[[Tensor], Tensor]  # residual ``[T, H]`` -> ids ``[T, K]``


class RouterProbe:
    """The norm and the router of one layer, for the residual state of an earlier layer."""

    def __init__(self, norm: nn.Module, router: nn.Module, declared: BlockRouter | None = None) -> None:
        """declared: the same router, where its class is declared."""
        self.norm = norm
        self._router = router
        self._declared = declared
        self._routes: dict[int, Route] = {}  # K -> the fastest computation of the router's ids

    def predict(self, residual: Tensor, num_experts_per_token: int) -> list[int]:
        """Residual ``[T, H]`` -> distinct expert ids; the likeliest first where T is 1."""
        return list(dict.fromkeys(self.route(residual, num_experts_per_token).flatten().tolist()))

    def route(self, residual: Tensor, num_experts_per_token: int) -> Tensor:
        """Residual ``[T, H]`` -> expert ids ``[T, K]`` on the residual's device; each token's likeliest first."""
        route = self._routes.get(num_experts_per_token)
        if route is None:
            route = self._routes[num_experts_per_token] = self._find_route(residual, num_experts_per_token)
        return route(residual)

    def _route_by_modules(self, residual: Tensor, k: int) -> Tensor:
        if self._declared is not None and not self._is_short:
            return self._declared.choose(self.norm.forward(residual))
        out: Any = self._router(self.norm.forward(residual))
        parts = out if isinstance(out, tuple) else (out,)
        ids = next((part for part in parts if isinstance(part, Tensor) and not part.is_floating_point()), None)
        if ids is not None:
            return ids
        scores: Tensor = parts[0]
        bias = getattr(self._router, "e_score_correction_bias", None)
        if bias is not None:
            scores = scores.sigmoid() + bias
        return scores.topk(k, dim=-1).indices

    @property
    def _is_short(self) -> bool:
        """Whether the fast path has replaced the router's forward."""
        return "forward" in vars(self._router)

    def _find_route(self, residual: Tensor, k: int) -> Route:
        """The first shorter computation that gives most of the modules' ids on noise as large as the residual."""

        def by_modules(residual: Tensor) -> Tensor:
            return self._route_by_modules(residual, k)

        if self._is_short:
            return by_modules
        generator = torch.Generator(residual.device).manual_seed(0)
        noise = torch.randn(TRIED_TOKENS, residual.shape[-1], generator=generator, device=residual.device)
        tried = (noise * residual.float().std()).to(residual.dtype)
        for kind in (NativeRouter, PlainRouter):
            try:
                route = kind(self.norm, self._router, k)
                expected, found = by_modules(tried), route(tried)
            except (TypeError, ValueError, RuntimeError, AttributeError, ConfigError):
                continue
            if expected.shape != found.shape:
                continue
            num_same = (expected[..., None] == found[..., None, :]).sum()
            if bool(num_same >= LEAST_SAME * expected.numel()):
                return route
        return by_modules


class PlainRouter:
    """An RMS norm and the greatest logits, in three operations: modules take a dozen and more for the same ids."""

    def __init__(self, norm: Any, router: Any, k: int) -> None:
        """norm, router: modules with a weight. Raises: AttributeError where they have none."""
        self._norm, self._router, self._k = norm.weight, router.weight, k
        self._bias = getattr(router, "bias", None)
        self._epsilon = _epsilon(norm)

    def __call__(self, residual: Tensor) -> Tensor:
        normed = F.rms_norm(residual, residual.shape[-1:], self._norm, self._epsilon)
        return F.linear(normed, self._router, self._bias).topk(self._k, dim=-1).indices


class NativeRouter:
    """The same in fp32 on the CPU, in two native calls for a token."""

    def __init__(self, norm: Any, router: Any, k: int) -> None:
        """norm, router: modules with a weight. Raises: AttributeError for others, ConfigError where no kernel fits."""
        weights = [norm.weight, router.weight, *([] if getattr(router, "bias", None) is None else [router.bias])]
        if not all(weight.is_cpu and weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights):
            raise ConfigError("The kernels take norms and routers in fp32, on the CPU.")
        norm_weight, weight, *bias = (each.detach() for each in weights)
        if norm_weight.shape != weight.shape[1:] or any(each.shape != weight.shape[:1] for each in bias):
            raise ConfigError(f"A norm of {tuple(norm_weight.shape)} before a router of {tuple(weight.shape)}.")
        self._norm = kernels.NormKernel(norm_weight, _epsilon(norm))
        linear = kernels.Linear.of_numbers(weight, *bias)
        self._router = kernels.RouterKernel(linear, top_k=k, is_of_chosen=True)
        sizes = (*weight.shape[::-1], k)
        self._normed, self._logits, self._weights = (torch.empty(1, n, dtype=torch.float32) for n in sizes)

    def __call__(self, residual: Tensor) -> Tensor:
        if residual.dtype != torch.float32 or residual.shape[1:] != self._normed.shape[1:]:
            raise TypeError(f"A residual {tuple(residual.shape)} in {residual.dtype}, where the kernels read fp32.")
        return self._row(residual) if len(residual) == 1 else torch.cat([self._row(row) for row in residual.split(1)])

    def _row(self, residual: Tensor) -> Tensor:
        ids = torch.empty(self._weights.shape, dtype=torch.int64)
        self._norm.step(residual if residual.is_contiguous() else residual.contiguous(), self._normed)
        self._router.step(self._normed, self._logits, self._weights, ids)
        return ids


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return torch.finfo(norm.weight.dtype).eps if epsilon is None else float(epsilon)


class ResidualCapture(HookObserver):
    """A forward pre-hook of a layer's norm that keeps the norm's input, ``[T, H]``, and changes nothing."""

    def __init__(self, residuals: MutableMapping[int, Tensor], layer: int) -> None:
        self._residuals, self._layer = residuals, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._residuals[self._layer] = args[0].reshape(-1, args[0].shape[-1])


def find_probes(hf: TextModel, layers: Sequence[ExpertsModule]) -> list[RouterProbe | None]:
    """The norm and the router in front of each experts module, where the family has them in the usual places."""
    return [_find_probe(hf, layer.block_name) for layer in layers]


def _find_probe(hf: TextModel, block_name: str) -> RouterProbe | None:
    found = find_router(hf, block_name)
    if found is None:
        return None
    norms: dict[str, Any] = dict(found.layer.named_children())
    norm = next((norms[name] for name in NORM_NAMES if name in norms), None)
    if norm is None or isinstance(norm, nn.ModuleList) or not found.routes_alone(_row(hf, norm)):
        return None
    return RouterProbe(norm, found.module, found if found.spec is not None else None)


def _row(hf: TextModel, norm: nn.Module) -> Tensor:
    """A hidden state ``[1, H]`` as wide as the norm's; some norms have their weight further inside."""
    weight = getattr(norm, "weight", None)
    width = hf.config.get_text_config().hidden_size if weight is None else len(weight)
    return torch.ones(1, width, dtype=hf.dtype, device=hf.device)
