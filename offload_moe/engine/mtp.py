"""The checkpoint's layer for multi-token prediction beside a loaded model: its plan, its weights, its passes."""

from dataclasses import replace
from typing import Any

import torch

from offload_moe.checkpoint.mtp import SHARED, build_mtp
from offload_moe.checkpoint.skeleton import load_config
from offload_moe.engine.assemble import Assembled, assemble
from offload_moe.engine.options import LoadOptions
from offload_moe.errors import ConfigError
from offload_moe.plan.parameters import ModelShape, describe_skeleton
from offload_moe.store import Store
from offload_moe.store.manifest import MTP


def find_module(store: Store, options: LoadOptions, dtype: torch.dtype) -> Any:
    """The layer without weights where the options choose it and the store has it, else None.

    Raises: ConfigError where it is chosen by name and the store has none.
    """
    if options.speculate not in ("auto", "mtp"):
        return None
    module = None if store.mtp is None else mtp_skeleton(store, dtype)
    if module is None and options.speculate == "mtp":
        raise ConfigError(
            f"{store.path} has no layer for multi-token prediction: its checkpoint brings none that is whole and of a "
            "known form, or an older version converted it, and then `offload-moe quantize` keeps it. Choose another "
            "--speculate."
        )
    return module


def mtp_skeleton(store: Store, dtype: torch.dtype) -> Any:
    """The module on `meta`; None where this version does not know its form."""
    config = load_config(store.path)
    config.dtype = dtype
    return build_mtp(config)


def with_mtp(shape: ModelShape, module: Any, *, is_fast_path: bool) -> ModelShape:
    """The shape of a model with the layer behind its others."""
    found = describe_skeleton(module, is_fast_path=is_fast_path)
    own = (replace(weight, name=MTP + weight.name) for weight in found.dense if weight.name not in SHARED)
    caches = (*shape.attention.cache_layers, *found.attention.cache_layers)
    return replace(
        shape,
        layers=(*shape.layers, *found.layers),
        dense=(*shape.dense, *own),
        attention=replace(shape.attention, cache_layers=caches),
    )


def assemble_mtp(store: Store, module: Any, hf: Any, dtype: torch.dtype, dense_codec: str | None) -> Assembled:
    """Load the layer's weights; embedding and head are those of the model `hf`, on the CPU.

    Raises: StoreError, StoreCorrupt: see `assemble`.
    """
    part = store.mtp
    assert part is not None
    module.set_input_embeddings(hf.get_input_embeddings())
    module.set_output_embeddings(hf.get_output_embeddings())
    return assemble(part, torch.device("cpu"), dtype, dense_codec=dense_codec, skeleton=module)
