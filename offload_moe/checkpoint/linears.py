"""Which dense weights are large projections that a model only ever multiplies with."""

from torch import nn

# By name, because other linear layers are read as matrices by their model (Mamba's `dt_proj`, latent attention's
# `kv_b_proj` once it is absorbed) or are too small to matter and too delicate to round (routers, gates, `q_a_proj`).
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
    }
)


def projection_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Module name -> linear layer, for attention and MLP projections and an output head of its own."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] in PROJECTIONS and f"{name}.weight" not in tied
    }
