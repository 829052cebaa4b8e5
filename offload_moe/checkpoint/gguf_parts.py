"""Assembly of one tensor of transformers from those in a GGUF file.

Source: llama.cpp, convert_hf_to_gguf.py and conversion/, whose steps are inverted; ggml-common.h, `block_mxfp4`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from offload_moe.checkpoint import gguf_delta
from offload_moe.checkpoint.gguf_experts import GgufExperts
from offload_moe.checkpoint.gguf_file import GgufTensor
from offload_moe.checkpoint.gguf_header import AGAIN
from offload_moe.checkpoint.gguf_names import PERMUTED, fused_experts, split_latent, transformers_name, with_mtp_apart
from offload_moe.checkpoint.mxfp4 import BLOCKS, SCALES
from offload_moe.errors import CheckpointError
from offload_moe.quant.gguf import TYPES

GPT_OSS, GRANITE = "gpt-oss", "granitemoe"
OF_ONE_ROW = ("mlp.shared_expert_gate.weight", "moe_statics.e_score_correction_bias")
Stored = GgufTensor | GgufExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPart:
    """Tensors that are one in transformers. join: joins the same rows of each, or all rows of each if `is_whole`.

    is_raw: the tensors' bytes are used unchanged, uint8 ``[..., bytes of a row]``.
    moves_rows: `join` changes the order of rows alone, or of whole blocks in them, so it can have their bytes.
    """

    tensors: tuple[Stored, ...]
    join: Callable[..., Tensor]
    is_whole: bool = False
    is_raw: bool = False
    moves_rows: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the joined tensor. Raises: CheckpointError for values that it cannot have, TransferError."""
        if self.is_raw:
            return self.join(*(tensor.raw(start, stop) for tensor in self.tensors))
        if not self.is_whole:
            return self.join(*(tensor.rows(start, stop).to(self.dtype) for tensor in self.tensors))
        try:
            return self.join(*(tensor.rows(0, tensor.shape[0]).to(self.dtype) for tensor in self.tensors))[start:stop]
        except ValueError as error:  # of `join`, about the values
            raise CheckpointError(f"{self._names}: {error}. {AGAIN}") from error

    @property
    def keeps_rows(self) -> bool:
        """Whether it has the bytes of the tensors' rows, of one type and possibly in another order."""
        is_one_kind = len({tensor.kind for tensor in self.tensors}) == 1
        return self.moves_rows and is_one_kind and all(len(tensor.shape) == 2 for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds the numbers of all tensors, whose types may differ."""
        dtypes = (tensor.dtype for tensor in self.tensors)
        return torch.uint8 if self.is_raw else reduce(torch.promote_types, dtypes)

    def shape(self) -> tuple[int, ...]:
        """The shape of the joined tensor. Raises: CheckpointError when the tensors do not fit together."""
        shapes = [(*t.shape[:-1], t.row_bytes) if self.is_raw else t.shape for t in self.tensors]
        try:
            return tuple(self.join(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self._names}: they do not fit together: {shapes}. {AGAIN}") from error

    @property
    def _names(self) -> str:
        return f"{self.tensors[0].path}: {' and '.join(tensor.name for tensor in self.tensors)}"


def parts(found: Mapping[str, Stored], architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, GgufPart]]:
    """Every tensor of the model under its name in transformers. found: of `stacked`. config: of the language model.

    Raises: CheckpointError when a half is missing, or heads do not fit.
    """
    num_layers = config.get("num_hidden_layers", 0)
    if type(num_layers) is not int:
        raise CheckpointError(f"config.json has no usable num_hidden_layers: {num_layers!r}. Download it again.")
    for name, part in _parts(found, architecture, config):
        yield with_mtp_apart(name, architecture, num_layers), part


def _parts(found: Mapping[str, Stored], architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, GgufPart]]:
    is_gpt_oss = architecture == GPT_OSS
    for name, tensor in found.items():
        if ".ffn_up_exps." in name or ".attn_v_b." in name:
            _half(found, tensor, name.replace("ffn_up", "ffn_gate").replace("attn_v", "attn_k"))
            continue  # handled with its other half
        if architecture == GRANITE and ".ffn_up_shexp." in name:
            continue  # too
        if both := fused_experts(name, architecture) or split_latent(name):
            pair = (tensor, _half(found, tensor, both[0]))
            yield from _pair(both[1], pair, is_gpt_oss)
        elif (delta := _delta_part(name, tensor, found, architecture, config)) is not None:
            yield delta
        elif (known := transformers_name(name, architecture)) is None or gguf_delta.is_second(name, architecture):
            continue
        elif architecture == GRANITE and ".ffn_gate_shexp." in name:
            pair = (tensor, _half(found, tensor, name.replace("ffn_gate", "ffn_up")))
            yield known, GgufPart(tensors=pair, join=_rows_of_both, is_whole=True, moves_rows=True)
        elif is_gpt_oss and ".ffn_down_exps.weight" in name:
            yield from _gpt_oss_experts(known, (tensor,))
        elif known.endswith(OF_ONE_ROW) and len(tensor.shape) == 1:
            yield known, GgufPart(tensors=(tensor,), join=_one_row, is_whole=True)
        elif known.endswith(".conv.conv.weight"):
            yield known, GgufPart(tensors=(tensor,), join=_of_one_channel, is_whole=True)
        elif architecture in gguf_delta.ARCHITECTURES and known.endswith("norm.weight"):
            yield known, GgufPart(tensors=(tensor,), join=gguf_delta.less_one)
        else:
            yield known, _permuted(known, tensor, architecture, config)


def _delta_part(
    name: str, tensor: Stored, found: Mapping[str, Stored], architecture: str, config: Mapping[str, Any]
) -> tuple[str, GgufPart] | None:
    """A tensor of a gated delta rule; None for others."""
    if architecture not in gguf_delta.ARCHITECTURES:
        return None
    made = gguf_delta.delta_part(name, architecture, config)
    if made is None:
        return None
    tensors = (tensor,) if made.beside is None else (tensor, _half(found, tensor, made.beside))
    moves_blocks = (
        made.columns_moved is not None and tensor.kind in TYPES and TYPES[tensor.kind].takes(made.columns_moved)
    )
    return made.name, GgufPart(
        tensors=tensors, join=made.join, is_whole=True, moves_rows=made.moves_rows or moves_blocks
    )


def _half(tensors: Mapping[str, Stored], first: Stored, name: str) -> Stored:
    other = tensors.get(name)
    if other is None:
        raise CheckpointError(f"{first.path}: tensor {first.name} has no {name} beside it. Download the file again.")
    if ".ffn_" in name and other.shape != first.shape:
        raise CheckpointError(
            f"{first.path}: tensor {first.name} is {list(first.shape)}, but {name} {list(other.shape)}. Download the "
            "file again."
        )
    return other


def _pair(name: str, pair: tuple[Stored, Stored], is_gpt_oss: bool) -> Iterator[tuple[str, GgufPart]]:
    if name.endswith("kv_b_proj.weight"):
        yield name, GgufPart(tensors=pair, join=_join_latent, is_whole=True)
    elif not is_gpt_oss:
        yield name, GgufPart(tensors=pair, join=_gate_before_up)
    elif name.endswith("_bias"):
        yield name, GgufPart(tensors=pair, join=_interleave)
    else:
        yield from _gpt_oss_experts(name, pair)


def _gpt_oss_experts(name: str, tensors: tuple[Stored, ...]) -> Iterator[tuple[str, GgufPart]]:
    """transformers has these matrices as [in, out], with alternating gate and up rows; MXFP4 keeps its bits."""
    if all(tensor.kind == "MXFP4" for tensor in tensors):
        yield name + BLOCKS, GgufPart(tensors=tensors, join=_blocks, is_raw=True)
        yield name + SCALES, GgufPart(tensors=tensors, join=_scales, is_raw=True)
    else:
        yield name, GgufPart(tensors=tensors, join=_turned)


def _permuted(name: str, tensor: Stored, architecture: str, config: Mapping[str, Any]) -> GgufPart:
    is_key = name.endswith("self_attn.k_proj.weight")
    if architecture not in PERMUTED or not (is_key or name.endswith("self_attn.q_proj.weight")):
        return GgufPart(tensors=(tensor,), join=_same, moves_rows=True)
    num_heads = config.get("num_key_value_heads" if is_key else "num_attention_heads")
    rows = tensor.shape[0]
    if type(num_heads) is not int or num_heads <= 0 or rows % (2 * num_heads):
        raise CheckpointError(f"{tensor.path}: {name} has {rows} rows, config.json says {num_heads} heads.")
    return GgufPart(tensors=(tensor,), join=partial(_halves, num_heads), is_whole=True, moves_rows=True)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _one_row(vector: Tensor) -> Tensor:
    return vector[None]


def _of_one_channel(kernels: Tensor) -> Tensor:
    return kernels[:, None]


def _halves(num_heads: int, whole: Tensor) -> Tensor:
    """llama.cpp rotates pairs of neighbours, transformers pairs from the two halves."""
    pairs: Tensor = whole.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _gate_before_up(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up], dim=1)


def _rows_of_both(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _join_latent(keys: Tensor, values: Tensor) -> Tensor:
    """keys ``[heads, latent, K]`` and values ``[heads, V, latent]`` -> ``[heads * (K + V), latent]``."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def _interleave(*rows: Tensor) -> Tensor:
    """``[E, R, ...]`` of gate and of up -> ``[E, 2 R, ...]``, alternating."""
    return torch.stack(rows, dim=2).flatten(1, 2)


def _turned(*rows: Tensor) -> Tensor:
    return _interleave(*rows).transpose(1, 2)


def _blocks(*raw: Tensor) -> Tensor:
    """ggml has elements 0 to 15 of a block in low nibbles and 16 to 31 in high ones; MXFP4 has neighbours in a byte."""
    bytes_: Tensor = _interleave(*raw).unflatten(-1, (-1, 17))[..., 1:]
    if bytes_.is_meta:
        return bytes_
    codes = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _scales(*raw: Tensor) -> Tensor:
    scales: Tensor = _interleave(*raw).unflatten(-1, (-1, 17))[..., 0]
    return scales
