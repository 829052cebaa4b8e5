"""Weights that the config ties to others, where a checkpoint brings both.

Source: transformers/modeling_utils.py, `PreTrainedModel.tie_weights`: the two are tied only where they are equal.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie(model: "PreTrainedModel", names: Collection[str]) -> list[str]:
    """Take every weight as one of its own that is in `names` beside the one that it would share. Returns those."""
    tied = model.all_tied_weights_keys
    own = [target for target, source in tied.items() if target in names and source in names]
    for target in own:
        del tied[target]
    return own


def share_tied_weights(model: "PreTrainedModel") -> None:
    """Tie what `untie` has left tied."""
    model.tie_weights(recompute_mapping=False)
