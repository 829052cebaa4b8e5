"""The parts of a declared layer that the native decode kernels do not compute, as texts."""

from collections.abc import Iterator, Mapping

from offload_moe.families.layer_spec import AttentionSpec, LayerSpec
from offload_moe.native.constants import DIM_STEP, MAX_DELTA_DIM


def attention_limits(spec: AttentionSpec) -> list[str]:
    """Limits of the kernel call for one attention module."""
    if spec.latent is not None or spec.delta is not None:
        return []
    reasons = {
        "an output gate": bool(spec.gate),
        "clamped queries, keys and values": spec.clip is not None,
        "queries scaled by their position and chunks": spec.query_scale is not None and spec.chunk is not None,
        "queries scaled by their position and windows": spec.query_scale is not None
        and spec.sliding_window is not None,
    }
    return _phrase("attention", reasons)


def order_limits(spec: LayerSpec) -> list[str]:
    """Limits of the kernel call that joins norms, attention, residual sums and the router of a layer."""
    return list(_order_limits(spec))


def _order_limits(spec: LayerSpec) -> Iterator[str]:
    norms = (spec.before_attention, spec.before_mlp)
    if spec.after_attention is not None or spec.after_mlp is not None or None in norms:
        yield "norms after attention and MLP"
    if spec.shared is not None and spec.experts.rpartition(".")[0] not in spec.shared.gate:
        yield "a shared expert outside the block of experts"


def _phrase(part: str, reasons: Mapping[str, bool]) -> list[str]:
    found = [reason for reason, is_so in reasons.items() if is_so]
    return [f"{part} with {', '.join(found)}"] if found else []


def layer_limits(spec: LayerSpec) -> list[str]:
    """All limits. Without any, one native thread takes a token through such layers, if their sizes allow it."""
    return [*attention_limits(spec.attention), *order_limits(spec)]


def card_limits(spec: LayerSpec) -> list[str]:
    """All limits of the device pass."""
    attention = spec.attention
    norms = (attention.query_norm, attention.key_norm)
    reasons = {
        "norms of all its heads after the rotation": attention.is_normed_rotated and attention.norm_span == "all heads",
        "layer norms of queries and keys": any(norm is not None and norm.is_centered for norm in norms),
    }
    return [*layer_limits(spec), *_phrase("attention", reasons), *_delta_limits(attention)]


def _delta_limits(spec: AttentionSpec) -> Iterator[str]:
    dims = () if spec.delta is None else (spec.head_dim, spec.delta.value_dims)
    for dim in dims:
        if dim % DIM_STEP or not 0 < dim <= MAX_DELTA_DIM:
            kernels = f"{DIM_STEP} to {MAX_DELTA_DIM}, in steps of {DIM_STEP}"
            yield f"a delta rule over heads of {dim} dims (kernels: {kernels})"
