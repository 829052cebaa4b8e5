"""The dense weights that are large projections and used only in matrix products."""

from torch import nn

# By name, because models read other linear layers as matrices (Mamba's `dt_proj`, latent attention's absorbed
# `kv_b_proj`), or they are small and sensitive to rounding (routers, gates, `q_a_proj`).
PROJECTIONS = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "o_proj",
        "q_b_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
        "lm_head",
        "eh_proj",
    }
)
# Of gated delta rules; other modules have linears of these names that they read as matrices.
DELTA_PROJECTIONS = frozenset(
    f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj")
)


def is_projection(name: str) -> bool:
    """By the name of a module."""
    *_, parent, own = f".{name}".split(".")
    return own in PROJECTIONS or f"{parent}.{own}" in DELTA_PROJECTIONS


def projection_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Module name -> linear layer, for attention and MLP projections and an untied output head."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_projection(name) and f"{name}.weight" not in tied
    }
