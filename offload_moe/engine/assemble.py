"""A transformers model from an expert store: skeleton, dense weights in place, expert parameters gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.checkpoint.generation import load_generation_config
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.skeleton import DtypePlan, skeleton_in
from offload_moe.checkpoint.ties import share_tied_weights, untie
from offload_moe.decode.dense import NarrowEmbedding, QuantLinear, RecordEmbedding, lookup_tables, quantize_linear
from offload_moe.errors import StoreError
from offload_moe.experts.attach import detach_parameters
from offload_moe.families.text_model import TextModel
from offload_moe.quant import get_codec
from offload_moe.quant.gguf import parse_gguf
from offload_moe.store import Store
from offload_moe.store.manifest import DenseEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """The model without experts, and its experts modules in layer order. notices: messages for the user."""

    hf: TextModel
    layers: list[ExpertsModule]
    notices: tuple[str, ...] = ()


def skeleton_of(store: Store, dtype: torch.dtype) -> Any:
    """The store's model without weights. Two models of one store share nothing."""
    skeleton = skeleton_in(store.path, dtype)
    untie(skeleton, store.dense)
    return skeleton


def assemble(
    store: Store,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dense_codec: str | None = None,
    is_exact: bool = False,
    in_panels: bool = False,
    skeleton: TextModel | None = None,
) -> Assembled:
    """Build the model and load every dense weight, cast to the compute dtype, onto the device.

    skeleton: from `skeleton_of`, filled in place; None makes one.
    dense_codec: quantize the large projections and the output head that the store holds as numbers; None keeps them.
    is_exact: quantized linears keep activations in fp32. in_panels: on a device, they have the device pass's order.

    Raises:
        StoreError: the store does not hold what the model needs.
        StoreCorrupt: a dense tensor does not match its checksum.
    """
    hf = skeleton if skeleton is not None else skeleton_of(store, dtype)
    dtypes = DtypePlan(hf, dtype)
    layers = find_experts(hf)
    _check_layers(store, layers)
    detach_parameters(layers)
    to_quantize = projection_linears(hf).keys() if dense_codec else ()
    share_tied_weights(hf)  # `_tied_head` and `lookup_tables` compare weights by identity
    head = _tied_head(hf) if dense_codec else None
    lookups = lookup_tables(hf, head.name if head else None) if device.type == "cpu" else set()
    is_in_panels = in_panels or (device.type == "cpu" and not is_exact)
    order: _Order = {"is_exact": is_exact, "keeps_panels": in_panels}
    untied: QuantLinear | None = None
    narrow: dict[str, NarrowEmbedding] = {}
    tables: dict[str, tuple[Tensor, DenseEntry]] = {}
    for entry, tensor in store.dense_tensors("panels" if is_in_panels else "rows"):
        name = entry.name.removesuffix(".weight")
        if dense_codec and head is not None and name == head.embedding:
            # The head takes a quantized copy of a tied embedding: reading all of that for every token costs more.
            untied = quantize_linear(tensor, get_codec(dense_codec), **order).to(device)
        if entry.quantized is not None and entry.is_lookup:
            tables[name] = tensor, entry
        elif entry.quantized is not None:
            codec, record = store.codec_of_dense(entry), tensor.to(device)
            _replace(hf, name, QuantLinear(record, entry.quantized, codec, is_repacked=True, **order))
        elif dense_codec and name in to_quantize:
            _replace(hf, name, quantize_linear(tensor, get_codec(dense_codec), **order).to(device))
        elif name in lookups and tensor.dtype == torch.bfloat16 and _dtype_of(hf, entry.name, dtypes) == torch.float32:
            narrow[name] = NarrowEmbedding(tensor, torch.float32)
        else:
            _set_tensor(hf, entry.name, tensor, device, dtypes)
    share_tied_weights(hf)
    if head is not None and untied is not None:
        _replace(hf, head.name, untied)
    for name, table in narrow.items():
        hf.set_submodule(name, table)
    for name, (record, entry) in tables.items():
        _set_table(hf, name, record, entry, order)
    hf.to(device)  # buffers the store does not hold, such as rotary frequencies
    stranded = [name for name, value in [*hf.named_parameters(), *hf.named_buffers()] if value.is_meta]
    if stranded:
        raise StoreError(
            f"{store.path} does not hold {stranded[0]} ({len(stranded)} tensors). Quantize the model again."
        )
    hf.generation_config, notice = load_generation_config(store.path, hf)
    hf.requires_grad_(False)
    return Assembled(hf=hf, layers=layers, notices=(notice,) if notice else ())


class _Order(TypedDict):
    """Settings of `QuantLinear`."""

    is_exact: bool
    keeps_panels: bool


def _set_table(hf: TextModel, name: str, record: Tensor, entry: DenseEntry, order: _Order) -> None:
    """An embedding in a type of GGUF; a head that shares it gets the same record in panels."""
    assert entry.quantized is not None
    codec = parse_gguf(entry.codec or "")
    assert codec is not None
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    if type(head) is nn.Linear and head.weight is weight:
        found = next(found for found, module in hf.named_modules() if module is head)
        _replace(hf, found, QuantLinear(record.clone(), entry.quantized, codec, **order))
    hf.set_submodule(name, RecordEmbedding(record, entry.quantized, codec, weight.dtype))


@dataclass(frozen=True, slots=True)
class _TiedHead:
    """Names of an output head and of the embedding whose weight it shares."""

    name: str
    embedding: str


def _tied_head(hf: TextModel) -> _TiedHead | None:
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if type(head) is not nn.Linear or head.weight is not getattr(embedding, "weight", None):
        return None
    names = {id(module): name for name, module in hf.named_modules()}
    return _TiedHead(names[id(head)], names[id(embedding)])


def _check_layers(store: Store, layers: Sequence[ExpertsModule]) -> None:
    found = [(layer.name, layer.num_experts, layer.shape) for layer in layers]
    stored = [(layer.name, layer.num_experts, layer.shape) for layer in store.layers]
    if found != stored:
        raise StoreError(
            f"{store.path} holds {len(stored)} MoE layers, this transformers builds {len(found)} others. "
            "Quantize the model again with this version."
        )


def _dtype_of(hf: TextModel, name: str, dtypes: DtypePlan) -> torch.dtype:
    owner, leaf = _owner(hf, name)
    return dtypes.of(name, getattr(owner, leaf).dtype)


def _set_tensor(hf: TextModel, name: str, tensor: Tensor, device: torch.device, dtypes: DtypePlan) -> None:
    owner, leaf = _owner(hf, name)
    value = tensor.to(device=device, dtype=_dtype_of(hf, name, dtypes))
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def _replace(hf: TextModel, name: str, linear: QuantLinear) -> None:
    owner, leaf = _owner(hf, name)
    old = getattr(owner, leaf)
    if old.bias is not None and not linear.shape.biases:  # else the record holds it
        linear.bias = old.bias
    setattr(owner, leaf, linear)


def _owner(hf: TextModel, name: str) -> tuple[Any, str]:
    owner, _, leaf = name.rpartition(".")
    return hf.get_submodule(owner), leaf
