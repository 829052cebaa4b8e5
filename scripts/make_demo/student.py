"""The split model as a thing that can be trained: experts are masks over the dense neurons.

Trained are the routers, a low-rank correction of each feed-forward matrix, and the norms. The dense weights stay.

Shapes: B sequences, T positions, H hidden, I intermediate, E experts, K top-k, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_moe.demo.dense import DenseModel
from offload_moe.demo.split import CORRECTED, NORMS
from scripts.make_demo.forward import DenseForward
from scripts.make_demo.layer_split import LayerSplit
from scripts.make_demo.recipe import Recipe

_SOFTNESS = 0.5  # of the gate that gradients see, in standard deviations of the router's scores


class Student(nn.Module):
    """The dense model with the layers in `splits`, its last ones, split."""

    def __init__(self, dense: DenseModel, splits: list[LayerSplit], recipe: Recipe) -> None:
        super().__init__()
        self._forward = DenseForward(dense, recipe.num_positions)
        self.num_layers: int = dense.config["num_hidden_layers"]
        self.num_dense = self.num_layers - len(splits)
        layers = range(self.num_layers)
        per_layer = {name: [self._forward.weight(layer, name) for layer in layers] for name in NORMS[:2]}
        self.norms = nn.ParameterDict({name: torch.stack(values) for name, values in per_layer.items()})
        self.norms[NORMS[2]] = nn.Parameter(dense.tensors["model.norm.weight"].clone())
        self.layers = nn.ModuleList(
            SplitFeedForward(self._forward, self.num_dense + index, split, recipe) for index, split in enumerate(splits)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to the normed hidden states [B, T, H] that the output head reads."""
        hidden = self._forward.embed(ids)
        for layer in range(self.num_layers):
            hidden = self._forward.attend(layer, hidden, self.norms[NORMS[0]][layer])
            norm = self.norms[NORMS[1]][layer]
            if layer < self.num_dense:
                hidden = self._forward.feed_forward(layer, hidden, norm)
            else:
                normed = self._forward.feed_forward_input(layer, hidden, norm)
                hidden = hidden + self.layers[layer - self.num_dense](normed)
        return self._forward.norm(hidden, self.norms[NORMS[2]])


class SplitFeedForward(nn.Module):
    """One layer's experts. Neurons stay in the dense model's order; `groups` says whose they are."""

    def __init__(self, forward: DenseForward, layer: int, split: LayerSplit, recipe: Recipe) -> None:
        super().__init__()
        self._weights = {module: forward.weight(layer, f"mlp.{module}") for module in CORRECTED}
        self._top_k = recipe.top_k
        num_experts, width = split.routed.shape
        groups = torch.full((self._weights["up_proj"].shape[0],), num_experts)
        groups[split.routed.flatten()] = torch.arange(num_experts).repeat_interleave(width)
        self.groups = groups
        router = split.router
        self.router = nn.Parameter(router / router.norm(dim=1).mean())
        self.corrections = nn.ParameterDict()
        generator = torch.Generator().manual_seed(recipe.seed + layer)
        for module in ("gate_proj", "up_proj"):
            num_out, num_in = self._weights[module].shape
            self.corrections[f"{module}_left"] = torch.zeros(num_out, recipe.rank)
            noise = torch.randn(recipe.rank, num_in, generator=generator)
            self.corrections[f"{module}_right"] = noise / num_in**0.5
        left, right = _best_factors(split.down - self._weights["down_proj"], 2 * recipe.rank)
        self.corrections["down_proj_left"], self.corrections["down_proj_right"] = left, right

    def forward(self, normed: Tensor) -> Tensor:
        neurons = F.silu(self._linear("gate_proj", normed)) * self._linear("up_proj", normed)
        mask = F.pad(self._gate(normed), (0, 1), value=1.0)
        return self._linear("down_proj", neurons * mask[..., self.groups])

    def _linear(self, module: str, inputs: Tensor) -> Tensor:
        left, right = self.corrections[f"{module}_left"], self.corrections[f"{module}_right"]
        return F.linear(inputs, self._weights[module]) + F.linear(F.linear(inputs, right), left)

    def _gate(self, normed: Tensor) -> Tensor:
        """1.0 for the K chosen experts, else 0.0, [B, T, E]; its gradient is that of a sigmoid around the boundary."""
        scores = F.linear(normed, self.router)
        best = scores.topk(self._top_k + 1, dim=-1)
        boundary = best.values[..., -2:].mean(dim=-1, keepdim=True)
        hard = torch.zeros_like(scores).scatter_(-1, best.indices[..., :-1], 1.0)
        distance = scores - boundary.detach()
        soft = torch.sigmoid(distance / (_SOFTNESS * scores.detach().std()))
        return hard + (soft - soft.detach())


def _best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[out, R] and [R, in] whose product is the nearest to the matrix."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors[:, -rank:]
    root = values[-rank:].clamp(min=1e-12) ** 0.25
    return left * root, (left.T @ matrix) / root[:, None]
