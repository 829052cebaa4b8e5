"""Weights that the config ties to others, in checkpoints that contain both.

Source: transformers/modeling_utils.py, `PreTrainedModel.tie_weights`: the two are tied only where they are equal.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie(model: "PreTrainedModel", names: Collection[str]) -> list[str]:
    """Separate every tied weight whose name is in `names` together with its target. Returns these names."""
    tied = model.all_tied_weights_keys
    own = [target for target, source in tied.items() if target in names and source in names]
    for target in own:
        del tied[target]
    return own


def share_tied_weights(model: "PreTrainedModel") -> None:
    """Tie the weights that `untie` has not separated."""
    model.tie_weights(recompute_mapping=False)
