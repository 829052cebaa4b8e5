"""The parameters of a model, counted on its skeleton without a download or an allocation.

Active parameters are those a token uses: everything but the routed experts, embeddings included, and the top-k
experts of every MoE layer, as in model cards.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.skeleton import DtypePlan, build_skeleton
from offload_moe.checkpoint.ties import untie
from offload_moe.errors import UnsupportedModelError
from offload_moe.families.text_model import TextModel
from offload_moe.plan.attention import AttentionShape, describe_attention
from offload_moe.plan.card_pass import PassShape, describe_pass
from offload_moe.quant import ExpertShape, Matrix
from offload_moe.quant.layout import weight_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Most families have `num_experts_per_tok`, at least as an alias.
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """The routed experts of one layer. record_bytes: of an expert, where a store says so; else its codec does."""

    num_experts: int
    expert: ExpertShape
    record_bytes: int | None = None

    @property
    def expert_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.expert.module_shapes().values())


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeight:
    """A dense tensor of the checkpoint, or, if `linear` is set, a projection with its bias."""

    name: str
    num_elements: int
    dtype: torch.dtype
    is_parameter: bool = True
    linear: ExpertShape | None = None
    record_bytes: int | None = None  # of one that a store keeps in a type of its own
    stays_fp32: bool = False  # whatever is computed in
    stays_bf16: bool = False  # an embedding kept in bf16 and widened at look-up, if the CPU computes in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The properties of a model that a plan uses. H hidden; `num_layers` counts all layers, `layers` the MoE layers."""

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    max_context: int | None
    top_k: int
    layers: tuple[MoeLayer, ...]
    dense: tuple[DenseWeight, ...]
    lookup_elements: int  # of a separate embedding table: stored, but only a row of it is read per token
    tied_head: ExpertShape | None  # an output head that shares the embeddings: a copy if heads are quantized
    attention: AttentionShape
    vocabulary: int = 0  # entries of the tokenizer
    device_pass: PassShape | str = "nothing describes it"  # or why there is none

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        return sum(weight.num_elements for weight in self.dense if weight.is_parameter)

    @property
    def total_parameters(self) -> int:
        return self.dense_parameters + sum(layer.num_experts * layer.expert_parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        routed = sum(min(self.top_k, layer.num_experts) * layer.expert_parameters for layer in self.layers)
        return self.dense_parameters + routed


def describe_model(
    config: "PreTrainedConfig", *, is_fast_path: bool = True, dense_names: Collection[str] = ()
) -> ModelShape:
    """Builds the skeleton of a config, a second at most, and counts it. is_fast_path: see `describe_skeleton`.

    dense_names: of the stored tensors, since the config may tie weights that have separate values.

    Raises:
        UnsupportedModelError: transformers cannot build it, or its experts cannot be bound.
    """
    skeleton = build_skeleton(with_dtype(config))
    untie(skeleton, dense_names)
    return describe_skeleton(skeleton, is_fast_path=is_fast_path)


def describe_skeleton(model: TextModel, *, is_fast_path: bool) -> ModelShape:
    """Counts a skeleton. is_fast_path: includes replacements of `offload_moe.decode` that change bits.

    Raises: UnsupportedModelError when its experts cannot be bound.
    """
    text_config = model.config.get_text_config(decoder=True)
    experts = find_experts(model)
    return ModelShape(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        max_context=getattr(text_config, "max_position_embeddings", None),
        top_k=_top_k(text_config, experts[0]),
        layers=tuple(MoeLayer(num_experts=found.num_experts, expert=found.shape) for found in experts),
        dense=_dense_weights(model, experts),
        lookup_elements=_lookup_elements(model),
        tied_head=_tied_head(model),
        attention=describe_attention(model, is_fast_path=is_fast_path),
        vocabulary=text_config.vocab_size,
        device_pass=describe_pass(model, experts),
    )


def with_dtype(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """A config that names no dtype is taken to be in bf16, as published MoE checkpoints are."""
    if getattr(config, "dtype", None) is not None:
        return config
    config = copy.deepcopy(config)
    config.dtype = torch.bfloat16
    return config


def linear_shape(linear: nn.Linear) -> ExpertShape:
    """A projection as the dense codecs see it: one matrix, and its bias."""
    matrix = Matrix(name="weight", out_features=linear.out_features, in_features=linear.in_features)
    return ExpertShape(matrices=(matrix,), biases=(("bias", linear.out_features),) if linear.bias is not None else ())


def _top_k(config: "PreTrainedConfig", experts: ExpertsModule) -> int:
    if experts.adapter is not None and experts.adapter.top_k is not None:
        return experts.adapter.top_k
    for part in (config, getattr(config, "ffn_config", None)):  # DBRX has it in `ffn_config`
        for name in TOP_K_NAMES:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple):  # one per layer
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    raise UnsupportedModelError(f"The {config.model_type} config does not have the number of experts per token.")


def _dense_weights(model: TextModel, experts: list[ExpertsModule]) -> tuple[DenseWeight, ...]:
    routed = {name for layer in experts for name in layer.parameter_names()}
    parameters = {name for name, _ in model.named_parameters()}
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    linears = projection_linears(model)
    inside = {f"{name}.{part}" for name, linear in linears.items() for part, _ in linear.named_parameters()}
    dtypes, published = DtypePlan(model, torch.bfloat16), model.dtype

    def weight(name: str, tensor: torch.Tensor, num_elements: int, **what: Any) -> DenseWeight:
        stays_fp32 = tensor.is_floating_point() and dtypes.of(name, torch.bfloat16) == torch.float32
        dtype = published if stays_fp32 else tensor.dtype
        return DenseWeight(name=name, num_elements=num_elements, dtype=dtype, stays_fp32=stays_fp32, **what)

    weights = []
    for name, linear in linears.items():
        num_elements = sum(parameter.numel() for parameter in linear.parameters())
        weights.append(weight(f"{name}.weight", linear.weight, num_elements, linear=linear_shape(linear)))
    for name, tensor in model.state_dict().items():
        if name not in routed and name not in tied and name not in inside:
            weights.append(weight(name, tensor, tensor.numel(), is_parameter=name in parameters))
    return tuple(weights)


def _tied_head(model: TextModel) -> ExpertShape | None:
    """As `assemble` recognizes it: a plain linear layer that multiplies with the input embeddings."""
    head, tied = model.get_output_embeddings(), set(getattr(model, "all_tied_weights_keys", ()))
    is_tied = any(module is head and f"{name}.weight" in tied for name, module in model.named_modules())
    return weight_shape(head.out_features, head.in_features) if type(head) is nn.Linear and is_tied else None


def _lookup_elements(model: TextModel) -> int:
    """The input embeddings, unless the output head multiplies with the same table."""
    embeddings = model.get_input_embeddings()
    shared = set(getattr(model, "all_tied_weights_keys", {}).values())
    is_shared = any(module is embeddings and f"{name}.weight" in shared for name, module in model.named_modules())
    weight = embeddings.weight
    assert isinstance(weight, torch.Tensor)
    return 0 if is_shared else weight.numel()
