"""Which of the packed integer formats a checkpoint's config names, and what of each cannot be read."""

from typing import Any

from offload_moe.checkpoint.packed import awq_weight, compressed_weight, gptq_weight
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

BITS = (4, 8)
ADVICE = "Use a version of the model in bf16 or FP8."


def compressed_tensors(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """Kimi-K2-Thinking's format. Raises: CheckpointError for other formats of compressed-tensors."""
    groups = settings.get("config_groups")
    listed = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [group.get("weights") if isinstance(group, dict) else None for group in listed]
    is_symmetric = all(isinstance(scheme, dict) and scheme.get("symmetric") is True for scheme in schemes)
    if settings.get("format") != "pack-quantized" or not schemes or not is_symmetric:
        raise CheckpointError(
            f"The checkpoint is quantized with compressed-tensors ({settings.get('format')}), of which symmetric "
            f"pack-quantized integers can be read. {ADVICE}"
        )
    if reordered := [name for name in stored.entries if name.endswith("_g_idx")]:
        raise CheckpointError(f"Tensor {reordered[0]} reorders inputs; such weights cannot be read. {ADVICE}")
    bits = [_bits("compressed-tensors", scheme.get("num_bits")) for scheme in schemes if isinstance(scheme, dict)]
    if len(set(bits)) > 1:
        raise CheckpointError(f"The checkpoint mixes weights of {sorted(set(bits))} bits. {ADVICE}")
    names = [name.removesuffix("_packed") for name in stored.entries if name.endswith("weight_packed")]
    return DequantizedTensors(stored, [compressed_weight(stored, name, bits[0]) for name in names])


def gptq(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """GPTQ with or without reordered inputs; the first version of the format stores zeros less one."""
    bits = _bits("GPTQ", settings.get("bits"))
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return DequantizedTensors(stored, [gptq_weight(stored, prefix, bits, offset) for prefix in _prefixes(stored)])


def awq(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """AutoAWQ's GEMM layout. Raises: CheckpointError for its others."""
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(
            f"The checkpoint is AWQ with {bits} bits in the {version} layout; 4 bits in the gemm layout can be read. "
            f"{ADVICE}"
        )
    return DequantizedTensors(stored, [awq_weight(stored, prefix) for prefix in _prefixes(stored)])


def _prefixes(stored: TensorSource) -> list[str]:
    return [name.removesuffix("qweight") for name in stored.entries if name.endswith(".qweight")]


def _bits(method: str, bits: object) -> int:
    if bits not in BITS or not isinstance(bits, int):
        raise CheckpointError(f"The checkpoint is {method} with {bits} bits; 4 and 8 can be read. {ADVICE}")
    return bits
