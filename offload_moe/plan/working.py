"""Bytes beside the weights: the key/value cache of a context, activations of a prompt, decoded weights.

T tokens computed at once, C context tokens, H hidden, K top-k, I intermediate.
"""

import torch

from offload_moe.convert.jobs import LOSSLESS
from offload_moe.native.device import tile_rows
from offload_moe.plan.budget import CPU_PROMPT_TOKENS, DEVICE_PROMPT_TOKENS
from offload_moe.plan.parameters import ModelShape
from offload_moe.quant import Matrix, is_built_in

FEED_FORWARD = ("gate_proj", "up_proj", "gate_up_proj")
HEAD = "lm_head"


def cache_bytes(shape: ModelShape, context: int, dtype: torch.dtype, *, kept: torch.dtype | None = None) -> int:
    """The key/value cache of one sequence of `context` tokens. States are fp32 wherever the model computes.

    kept: the dtype of keys and values where a layer has nothing else; None: `dtype`.
    """
    total = 0
    for layer in shape.attention.cache_layers:
        each = kept if kept is not None and layer.is_plain else dtype
        total += layer.per_token * min(context, layer.window or context) * each.itemsize
        total += (layer.fixed + layer.earlier) * torch.float32.itemsize
    return total


def activation_bytes(
    shape: ModelShape,
    context: int,
    dtype: torch.dtype,
    *,
    kept: torch.dtype | None = None,
    num_new: int | None = None,
) -> int:
    """An upper estimate of the widest layer's activations for a prompt chunk.

    num_new: tokens that are computed at once; None takes a chunk of a prompt. kept: as of `cache_bytes`; prompts that
    torch attends for widen one layer's keys and values.

    Residual stream, its norm and their sums: 4 H. In addition the largest of: queries, keys, values and output of the
    attention, with keys and values of the whole context expanded to all heads (before that, and also if every head has
    its own, the copy of one layer's cache that outgrows its tensor), and the additions of latent attention, see
    `AttentionWork`; gate, up and product of a dense MLP, 3 I; outputs of every routed pair, K H, and one expert that
    all tokens chose, with its inputs, H + 3 I.
    """
    on_cpu = dtype == torch.float32
    chunk = CPU_PROMPT_TOKENS if on_cpu else DEVICE_PROMPT_TOKENS
    num_tokens = min(context, chunk) if num_new is None else num_new
    works, cached = shape.attention.works, max((layer.per_token for layer in shape.attention.cache_layers), default=0)
    narrow = dtype if kept is None else kept
    if narrow != dtype and shape.attention.is_native:
        attention = max((work.native_elements(num_tokens) for work in works), default=0)
        attention += context * cached * narrow.itemsize // dtype.itemsize  # the copy of a cache that outgrows its room
    else:
        attention = max((work.elements(num_tokens, context, on_cpu=on_cpu) for work in works), default=0)
        attention += context * cached * (num_tokens > 1 and narrow != dtype)
    widths = [matrix.out_features for name, matrix in _matrices(shape) if name in FEED_FORWARD]
    dense = num_tokens * 3 * max(widths, default=0)
    intermediate = max(layer.expert.matrices[-1].in_features for layer in shape.layers)
    routed = num_tokens * ((shape.top_k + 1) * shape.hidden_size + 3 * intermediate)
    return (num_tokens * 4 * shape.hidden_size + max(attention, dense, routed)) * dtype.itemsize


def tile_bytes(shape: ModelShape, codec: str, dense_codec: str, dtype: torch.dtype, *, has_device: bool) -> int:
    """The largest weights that are decoded before they are multiplied.

    Native kernels on the CPU multiply records without decoding. On a device nf4 decodes a matrix for several tokens,
    which does not occur in the output head; other codecs decode a matrix through fp32, a large one by tiles of rows.
    Records in panels are copied to rows by the same tiles, one or two bytes of each weight, which are not counted. An
    expert in the codec of an extension is decoded as a whole.
    """
    is_whole = dense_codec == LOSSLESS
    left_out = (HEAD,) if dense_codec == "nf4" else ()
    linears = [] if is_whole else [(matrix,) for name, matrix in _matrices(shape) if name not in left_out]
    return max(
        *(_decoded_bytes(layer.expert.matrices, codec, dtype, has_device=has_device) for layer in shape.layers),
        *(_decoded_bytes(matrices, dense_codec, dtype, has_device=has_device) for matrices in linears),
        0,
    )


def _decoded_bytes(matrices: tuple[Matrix, ...], codec: str, dtype: torch.dtype, *, has_device: bool) -> int:
    sizes = [matrix.out_features * matrix.in_features for matrix in matrices]
    tiles = [min(matrix.out_features, tile_rows(matrix.in_features)) * matrix.in_features for matrix in matrices]
    if codec == LOSSLESS:
        return 0 if dtype == torch.bfloat16 else sum(sizes) * dtype.itemsize
    if not is_built_in(codec):
        return sum(sizes) * (torch.float32.itemsize + dtype.itemsize)
    if not has_device:
        return 0
    if codec == "nf4":
        return max(sizes) * dtype.itemsize
    return sum(tiles) * (torch.float32.itemsize + dtype.itemsize)


def _matrices(shape: ModelShape) -> list[tuple[str, Matrix]]:
    """The last name and the matrix of each dense projection."""
    return [
        (weight.name.removesuffix(".weight").rpartition(".")[2], weight.linear.matrices[0])
        for weight in shape.dense
        if weight.linear is not None
    ]
