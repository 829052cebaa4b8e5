"""How checkpoints bring a layer for multi-token prediction: which families, where its tensors are, and their names.

Sources of the names: transformers' conversion mapping of `MtpModel`, and the weight mappings of vLLM's
`deepseek_mtp`, `glm4_moe_mtp`, `hy_v3_mtp` and `qwen3_next_mtp`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
OWN = ("enorm", "hnorm", "eh_proj")  # beside the decoder layer, as children of the module
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # of a config: how many such layers


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpForm:
    """One form.

    place: a pattern of where its tensors are, `{first}` the number of the model's layers; its group is the rest of a
    name. names: of parts of the module, by the rest. decoder: what stands in the module before all other names.
    number: how many such layers there are where a config says nothing. settings: of a config of the module's family
    with that layer alone.
    """

    place: str
    names: Mapping[str, str]
    decoder: str
    number: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, first: int | None, names: Collection[str]) -> dict[str, str]:
        """Names in the module -> those in the checkpoint, of the tensors that are in this form."""
        found = ((re.fullmatch(self.place.format(first=first), name), name) for name in names)
        rests = ((match[1], name) for match, name in found if match is not None)
        return {self.names.get(rest) or self.decoder + rest: name for rest, name in rests}


BEHIND = MtpForm(  # as one more decoder layer, which has the other parts, too
    place=r"(?:.*\.)?layers\.{first}\.(.+)",
    names={f"{name}.weight": f"{name}.weight" for name in OWN}
    | {
        "shared_head.norm.weight": NORM,
        "shared_head.head.weight": HEAD,  # a copy of the model's
        "embed_tokens.weight": EMBEDDING,  # too
        "final_layernorm.weight": NORM,
    },
    decoder="model.layers.0.",
    settings={"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]},  # families have the one or the other
)
APART = MtpForm(  # a small model of its own
    place=r"mtp\.(.+)",
    names={
        "pre_fc_norm_embedding.weight": "enorm.weight",
        "pre_fc_norm_hidden.weight": "hnorm.weight",
        "fc.weight": "eh_proj.weight",
    },
    decoder="model.",
    number=1,
    settings={"layer_types": ["full_attention"], "mlp_only_layers": [], "decoder_sparse_step": 1},
)
FORMS: Mapping[str, MtpForm] = {
    "deepseek_v3": BEHIND,
    "glm4_moe": BEHIND,
    "glm4_moe_lite": BEHIND,
    "hy_v3": BEHIND,
    "qwen3_next": APART,
    "qwen3_5_moe_text": APART,
}

# Why that of other families is left out, where its tensors were looked up.
_NOT_NATIVE = "layers of this family do not decode natively, so no tokens are guessed"
_SEVERAL = "several layers that follow each other are not loaded"
LEFT_OUT: Mapping[str, str] = {
    "bailing_hybrid": _NOT_NATIVE,
    "deepseek_v32": _NOT_NATIVE,
    "deepseek_v4": _NOT_NATIVE,
    "ernie4_5_moe": "its layer is dense and has no norm in front of the head, a form that is not loaded",
    "exaone_moe": "what its layer computes is not established",
    "glm_moe_dsa": _NOT_NATIVE,
    "inkling_text": _NOT_NATIVE,
    "longcat_flash": _NOT_NATIVE,
    "mellum": _NOT_NATIVE,
    "mimo_v2_flash": _NOT_NATIVE,
    "minimax_m3_vl_text": _NOT_NATIVE,
    "nemotron_h": _NOT_NATIVE,
    "step3p5": _SEVERAL,
}
UNKNOWN = "this version does not load those of this family"
_IS_OF_MTP = re.compile(r"(?:^|[._])(?:mtp|nextn)(?:$|[._])|(?:^|\.)eh_proj\.")


def form_of(config: "PreTrainedConfig") -> MtpForm | None:
    """The form that a family's checkpoints have; None where it is not one that is loaded."""
    return FORMS.get(config.get_text_config(decoder=True).model_type)


def why_left_out(config: "PreTrainedConfig", names: Collection[str]) -> str:
    """A notice about tensors that a model does not have, where some are for multi-token prediction; else empty."""
    if not any(map(_IS_OF_MTP.search, names)):
        return ""
    family = config.get_text_config(decoder=True).model_type
    reason = LEFT_OUT.get(family, UNKNOWN)
    return (
        f"The checkpoint's tensors for multi-token prediction are left out: {reason} ({family}). "
        "Answers are the same without them."
    )
