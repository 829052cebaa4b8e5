"""The parts of a decoder that a pass computes, and which the device pass takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offload_moe.card.linears import has_kernel, linear_of
from offload_moe.card.norms import Norm, norm_of
from offload_moe.decode.dense import NarrowEmbedding, RecordEmbedding
from offload_moe.decode.head import gives_products
from offload_moe.decode.probe import Uncovered
from offload_moe.decode.rotation import RotationKeeper, rotation_keeper
from offload_moe.decode.wiring import Wiring, wiring_of
from offload_moe.errors import DevicePassUnavailable
from offload_moe.experts.attach import AdaptedForward, BoundExperts, bound_experts
from offload_moe.families.layer_classes import LAYERS
from offload_moe.families.layer_spec import LayerSpec, RouterSpec
from offload_moe.families.limits import card_limits
from offload_moe.families.read_layer import layer_spec, norm_spec
from offload_moe.families.text_model import TextModel
from offload_moe.native.kernels import Linear
from offload_moe.native.planes import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer. module: of transformers. bound: its experts; None for a dense MLP."""

    module: Any
    spec: LayerSpec
    bound: BoundExperts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An embedding: rows of numbers, or of blocks of a type of GGUF. codec: by its name in the kernels."""

    rows: Tensor
    codec: str
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """A decoder whose layers the device pass takes.

    table: of the embedding. head: the output head, whose products are the
    model's logits; None where they are not, or it has no kernel, for this reason. rotation: of a model that rotates by
    the length of the sequence.
    """

    wiring: Wiring
    layers: Sequence[DecoderLayer]
    table: Table
    final_norm: Norm
    head: Linear | None
    why_no_head: str
    rotation: RotationKeeper | None

    @property
    def hidden(self) -> int:
        return self.table.columns

    @property
    def routers(self) -> list[RouterSpec]:
        """Of the layers that have one."""
        return [layer.spec.router for layer in self.layers if layer.spec.router is not None]


def why_not(hf: TextModel) -> str:
    """Why the device pass does not take a model, as far as its classes say; it may be on the meta device."""
    layers = getattr(hf.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return "a decoder without layers"
    for module in layers:
        spec = layer_spec(module)
        if spec is None:
            return f"a layer of a class that is not declared ({type(module).__name__})"
        if type(module).__name__ not in LAYERS:
            return "a layer that an extension declares, which is compared with its module on the CPU only"
        if limits := card_limits(spec):
            return " and ".join(limits)
    return ""


def decoder_parts(hf: TextModel) -> DecoderParts:
    """The parts of a model's decoder. Raises: DevicePassUnavailable."""
    if reason := why_not(hf):
        raise DevicePassUnavailable(reason)
    decoder = hf.get_decoder()
    try:
        wiring = wiring_of(decoder)
    except Uncovered as error:
        raise DevicePassUnavailable(str(error)) from error
    table = _table(wiring.embedding)
    head, why_no_head = _head(hf, wiring)
    return DecoderParts(
        wiring=wiring,
        layers=[_decoder_layer(module) for module in wiring.layers],
        table=table,
        final_norm=_final_norm(wiring.norm, table),
        head=head,
        why_no_head=why_no_head,
        rotation=rotation_keeper(hf),
    )


def _table(embedding: Any) -> Table:
    """Raises: DevicePassUnavailable."""
    if isinstance(embedding, RecordEmbedding):
        kind = embedding.kind.name
        if not has_kernel(kind, is_table=True):
            raise DevicePassUnavailable(f"an embedding in GGUF's type {kind} has no kernel there")
        return Table(rows=embedding.record, codec=f"OM_{kind}", columns=embedding.embedding_dim)
    if type(embedding) not in (nn.Embedding, NarrowEmbedding):
        raise DevicePassUnavailable(f"an embedding that is a {type(embedding).__name__}")
    weight = embedding.weight.detach()
    if weight.dtype not in DTYPES:
        raise DevicePassUnavailable(f"an embedding in {weight.dtype} has no kernel there")
    return Table(rows=weight, codec="OM_BF16" if DTYPES[weight.dtype] else "OM_FP32", columns=weight.shape[1])


def _decoder_layer(module: nn.Module) -> DecoderLayer:
    spec = layer_spec(module)
    assert spec is not None
    if spec.router is None:
        return DecoderLayer(module=module, spec=spec, bound=None)
    experts = module.get_submodule(spec.bound_path)
    is_declared = spec.router.scales_inputs  # what the adapter does besides passing on
    if isinstance(vars(experts).get("forward"), AdaptedForward) and not is_declared:
        raise DevicePassUnavailable("experts with a forward of an adapter's own")
    return DecoderLayer(module=module, spec=spec, bound=bound_experts(experts))


def _final_norm(module: Any, table: Table) -> Norm:
    spec = norm_spec(module)
    if spec is None:
        raise DevicePassUnavailable(f"a last norm that is a {type(module).__name__}")
    return norm_of(module, spec, table.columns, table.rows.device)


def _head(hf: TextModel, wiring: Wiring) -> tuple[Linear | None, str]:
    """The output head, or why a pass does not have it."""
    module = hf.get_output_embeddings()
    if not isinstance(module, nn.Module) or not gives_products(hf, module, wiring):
        return None, "its logits are other numbers than the products of its output head"
    try:
        return linear_of(module), ""
    except DevicePassUnavailable as error:
        return None, str(error)
