"""Bytes of the weights: in the checkpoint, in a store, and in memory."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from offload_moe.convert.jobs import LOSSLESS, MXFP4
from offload_moe.plan.parameters import DenseWeight, ModelShape, MoeLayer
from offload_moe.quant import CODECS, get_codec
from offload_moe.store.in_place import GGUF

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FP16_BYTES = 2
MXFP4_BITS = 4.25  # 4-bit codes and an 8-bit scale per 32


def record_bytes(layer: MoeLayer, codec: str) -> int:
    """Bytes of an expert's record."""
    if layer.record_bytes is not None:
        return layer.record_bytes
    return get_codec(codec).layout(layer.expert).record_bytes


def slot_bytes(shape: ModelShape, codec: str) -> int:
    """Bytes of one expert slot: every slot holds the largest record of any layer."""
    return max(record_bytes(layer, codec) for layer in shape.layers)


def experts_bytes(shape: ModelShape, codec: str) -> int:
    """Bytes of all expert records of a store."""
    return sum(layer.num_experts * record_bytes(layer, codec) for layer in shape.layers)


def routed_bytes(shape: ModelShape, codec: str) -> int:
    """The expert records one token is routed to, over all layers."""
    return sum(min(shape.top_k, layer.num_experts) * record_bytes(layer, codec) for layer in shape.layers)


def dense_store_bytes(shape: ModelShape, codec: str) -> int:
    """Dense weights in a store: projections as records of the codec, others in the checkpoint's dtype."""
    return sum(_weight_bytes(weight, codec, weight.dtype) for weight in shape.dense)


def dense_memory_bytes(shape: ModelShape, codec: str, dtype: torch.dtype, *, stored: str = LOSSLESS) -> int:
    """Dense weights in memory: records unchanged, others in the compute dtype.

    stored: their codec in the store. If it differs they are quantized while they load, and an output head that shares
    the embeddings becomes a copy.
    """
    is_quantized_now = codec != stored
    total = sum(
        _weight_bytes(weight, codec, torch.float32 if weight.stays_fp32 else dtype, is_padded=not is_quantized_now)
        for weight in shape.dense
    )
    if dtype == torch.float32 and (is_quantized_now or shape.tied_head is None):  # else the head shares them
        total -= sum(weight.num_elements * 2 for weight in shape.dense if weight.stays_bf16)
    if is_quantized_now and shape.tied_head is not None:
        total += get_codec(codec).layout(shape.tied_head).num_bytes
    return total


def with_narrow_embeddings(shape: ModelShape, is_bf16: Callable[[DenseWeight], bool]) -> ModelShape:
    """Mark the embeddings that are bf16 on disk: `decode.dense.NarrowEmbedding` keeps them so."""
    dense = tuple(
        replace(weight, stays_bf16=weight.name.endswith("embed_tokens.weight") and is_bf16(weight))
        for weight in shape.dense
    )
    return replace(shape, dense=dense)


def store_bytes(shape: ModelShape, codec: str, dense_codec: str) -> int:
    """A whole store without its headers, which take 4 KiB and a few hundred bytes per tensor."""
    return experts_bytes(shape, codec) + dense_store_bytes(shape, dense_codec)


def store_bytes_per_codec(shape: ModelShape, dense_codec: str, codecs: Iterable[str]) -> dict[str, int]:
    """Codec -> bytes of the store with that codec for its experts."""
    return {codec: store_bytes(shape, codec, dense_codec) for codec in codecs}


def expert_codecs(config: "PreTrainedConfig") -> tuple[str, ...]:
    """The codecs that a checkpoint's experts can be converted to, the default first."""
    others = tuple(name for name in CODECS if name != MXFP4)
    settings = getattr(config, "quantization_config", None)
    return (MXFP4, *others) if isinstance(settings, dict) and settings.get("quant_method") == MXFP4 else others


def checkpoint_estimate(shape: ModelShape, config: "PreTrainedConfig") -> int:
    """An estimate of the checkpoint's bytes without its files: parameters in its dtype, or in its quantized bits.

    Layers that transformers leaves out, such as those for multi-token prediction, are not included.
    """
    routed = shape.total_parameters - shape.dense_parameters
    linear = sum(weight.num_elements for weight in shape.dense if weight.linear is not None)
    plain = sum(weight.num_elements * weight.dtype.itemsize for weight in shape.dense if weight.linear is None)
    itemsize = shape.dense[0].dtype.itemsize
    bits = _quantized_bits(getattr(config, "quantization_config", None))
    if bits is None:
        return (routed + linear) * itemsize + plain
    if bits == MXFP4_BITS:  # experts only
        return int(routed * bits / 8) + linear * itemsize + plain
    return int((routed + linear) * bits / 8) + plain


def fp16_bytes(num_parameters: int) -> int:
    return num_parameters * FP16_BYTES


def _weight_bytes(weight: DenseWeight, codec: str, dtype: torch.dtype, *, is_padded: bool = True) -> int:
    """is_padded: to the whole record of a store."""
    if weight.record_bytes is not None:
        return weight.record_bytes
    if weight.linear is not None and codec not in (LOSSLESS, GGUF):
        layout = get_codec(codec).layout(weight.linear)
        return layout.record_bytes if is_padded else layout.num_bytes
    return weight.num_elements * (dtype if weight.dtype.is_floating_point else weight.dtype).itemsize


def _quantized_bits(quantization: Any) -> float | None:
    if not isinstance(quantization, dict):
        return None
    method = quantization.get("quant_method")
    if method == MXFP4:
        return MXFP4_BITS
    if method == "fp8":
        return 8.0
    bits = quantization.get("bits")
    return float(bits) if isinstance(bits, int | float) else None
