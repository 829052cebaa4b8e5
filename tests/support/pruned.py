"""Models whose layers have different numbers of experts, as pruned ones do."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from support.tiny_models import tiny_model

SIZES = {"qwen3_moe": [5, 8, 8, 3, 6], "mixtral": [6, 2, 4]}
_NAMES = {"qwen3_moe": ("Qwen3Moe", "num_experts"), "mixtral": ("Mixtral", "num_local_experts")}


@contextmanager
def built_pruned(family: str) -> Iterator[None]:
    """transformers builds each layer of this family with the `experts_per_layer` of the config."""
    prefix, field = _NAMES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layer_class = getattr(module, f"{prefix}DecoderLayer")
    init = layer_class.__init__

    def init_pruned(self: Any, config: Any, layer_idx: int) -> None:
        most = getattr(config, field)
        setattr(config, field, config.experts_per_layer[layer_idx])
        try:
            init(self, config, layer_idx)
        finally:
            setattr(config, field, most)

    layer_class.__init__ = init_pruned
    try:
        yield
    finally:
        layer_class.__init__ = init


def pruned_model(family: str) -> PreTrainedModel:
    """See `tiny_model`."""
    sizes = SIZES[family]
    with built_pruned(family):
        settings = {_NAMES[family][1]: max(sizes), "experts_per_layer": sizes, "num_hidden_layers": len(sizes)}
        return tiny_model(family, **settings)
