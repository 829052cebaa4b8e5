"""The checkpoint's layer for multi-token prediction beside a loaded model: its plan, its weights, its passes."""

from collections.abc import Callable
from typing import Any

import torch

from offload_moe.checkpoint.mtp import build_mtp
from offload_moe.checkpoint.skeleton import load_config
from offload_moe.engine.assemble import Assembled, assemble
from offload_moe.engine.options import LoadOptions
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.families.text_model import MtpModel, TextModel
from offload_moe.plan.mtp import describe_mtp, with_mtp
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement
from offload_moe.store import Store


def find_module(store: Store, options: LoadOptions, dtype: torch.dtype) -> MtpModel | None:
    """The layer without weights where the options choose it and the store has it, else None.

    Raises: ConfigError where it is chosen by name and the store has none.
    """
    if options.speculate not in ("auto", "mtp"):
        return None
    module = None if store.mtp is None else mtp_skeleton(store, dtype)
    if module is None and options.speculate == "mtp":
        raise ConfigError(
            f"{store.path} has no layer for multi-token prediction: its checkpoint brings none that is whole and of a "
            "known form, or an older version converted it. In the second case remove the store (`offload-moe remove`) "
            "and convert the checkpoint again; in the first choose another --speculate."
        )
    return module


def mtp_skeleton(store: Store, dtype: torch.dtype) -> MtpModel | None:
    """The module on `meta`; None where this version does not know its form."""
    config = load_config(store.path)
    config.dtype = dtype
    return build_mtp(config)


def place_mtp(
    shape: ModelShape, module: Any, options: LoadOptions, place: Callable[[ModelShape], Placement]
) -> tuple[Any, ModelShape, Placement]:
    """The layer where it is chosen by name, or where everything else but a few expert slots stays as it is without it.

    Returns None in its place elsewhere, and the shape and the placement of what is to be loaded. Raises: BudgetError.
    """
    whole = with_mtp(shape, describe_mtp(module, is_fast_path=True))
    if options.speculate == "mtp":
        return module, whole, place(whole)
    placement = place(shape)
    try:
        beside = place(whole)
    except BudgetError:
        return None, shape, placement
    is_same = (beside.context, beside.dense_codec) == (placement.context, placement.dense_codec)
    top_k = sum(min(shape.top_k, layer.num_experts) for layer in whole.layers)
    return (module, whole, beside) if is_same and beside.ram.num_slots >= top_k else (None, shape, placement)


def assemble_mtp(store: Store, module: Any, hf: TextModel, dtype: torch.dtype, dense_codec: str | None) -> Assembled:
    """Load the layer's weights; embedding and head are those of the model `hf`, on the CPU.

    Raises: StoreError, StoreCorrupt: see `assemble`.
    """
    part = store.mtp
    assert part is not None
    module.set_input_embeddings(hf.get_input_embeddings())
    module.set_output_embeddings(hf.get_output_embeddings())
    return assemble(part, torch.device("cpu"), dtype, dense_codec=dense_codec, skeleton=module)
