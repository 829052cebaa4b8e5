"""Tensors of quantized checkpoints that have no place in a model and do not affect its weights."""

import re
from collections.abc import Iterable

from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

# Scales and zeros of activations, for engines that quantize them; and of keys, values, queries and attention weights,
# for engines with a quantized key/value cache. Bounds are FBGEMM's.
# Source: vLLM, model_loader/weight_utils.py, `maybe_remap_kv_scale_name`; compressed-tensors, quantization/lifecycle;
# AutoFP8; ModelOpt; Quark; transformers, integrations/fbgemm_fp8.py and finegrained_fp8.py.
ROUNDED = ("input", "output", "activation", "kv", "k", "v", "q", "kv_cache", "prob", "prob_output", "softmax", "attn")
KINDS = ("scale", "zero_point", "global_scale", "scale_ub", "scaling_factor")
ACTIVATIONS = re.compile(rf"(?:.*(?:\.|_proj_))?(?:{'|'.join(ROUNDED)})_(?:{'|'.join(KINDS)})")


def with_a_meaning(stored: TensorSource, names: Iterable[str], *, may_read: bool) -> tuple[str, ...]:
    """The tensors without a place in the model that would affect its results.

    A bias of zeros does not: GPTQ writes one for every projection, even if the model has none.
    may_read: whether values can be read.

    Raises: CheckpointError when they cannot and are needed.
    """
    left = [name for name in names if not ACTIVATIONS.fullmatch(name)]
    if not may_read and left and all(_is_bias(name) for name in left):
        raise CheckpointError(
            f"{stored.entries[left[0]].path}: tensor {left[0]} has no place in the model. Whether it is a bias of "
            "zeros, which means nothing, cannot be seen shard by shard. Convert it without --delete-source-shards."
        )
    return tuple(name for name in left if not (may_read and _is_bias(name) and not stored.read(name).float().any()))


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")
