"""From the tensor names in a checkpoint to the parameter names of the model.

Source: transformers/core_model_loading.py, `convert_and_load_state_dict_in_model` steps 1 and 2, without the tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_moe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(slots=True, kw_only=True)
class SourceGroup:
    """Checkpoint tensors that are converted together.

    `sources` lists the tensor names per source pattern in natural order: for a module list, the order of the experts.
    `converter` is None where the tensor is only renamed.
    """

    target: str
    converter: "WeightConverter | None"
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """The conversion groups of a checkpoint's tensors; `unexpected` ones have no place in the model."""

    groups: tuple[SourceGroup, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]


def map_names(model: "PreTrainedModel", names: Iterable[str]) -> NameMap:
    """Sort the tensor names of a checkpoint into conversion groups, like `from_pretrained`.

    Raises:
        CheckpointError: two tensors claim the same parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, SourceGroup] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            unexpected.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, SourceGroup(target=target, converter=converter))
        if group.converter is not converter or (converter is None and group.sources):
            raise CheckpointError(f"Tensors {group.names[0]} and {name} both claim parameter {target}.")
        group.sources.setdefault(pattern or name, []).append(name)
    ignorable = _pattern(_unexpected_patterns(model))
    prefix = f"{model.base_model_prefix}."
    is_part = any(source.startswith(prefix) for group in groups.values() for source in group.names) and not any(
        name.startswith(prefix) for name in state
    )
    ignored = tuple(
        name
        for name in unexpected
        if (ignorable and ignorable.search(name)) or (is_part and not name.startswith(prefix))
    )
    return NameMap(
        groups=tuple(groups.values()),
        unexpected=tuple(name for name in unexpected if name not in set(ignored)),
        ignored=ignored,
    )


def required_names(model: "PreTrainedModel") -> set[str]:
    """Parameters and buffers that a checkpoint must have: not tied to another, not optional for this model class."""
    optional = _pattern(model._keys_to_ignore_on_load_missing or ())
    return {
        name
        for name in model.state_dict()
        if name not in model.all_tied_weights_keys and not (optional and optional.search(name))
    }


def _unexpected_patterns(model: "PreTrainedModel") -> set[str]:
    """Tensors that transformers ignores too: MTP layers, buffers that moved or are no longer saved.

    Source: transformers/modeling_utils.py, `_adjust_missing_and_unexpected_keys`.
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns | _mtp_patterns(model)


def _mtp_patterns(model: "PreTrainedModel") -> set[str]:
    """Layers after the last one, for multi-token prediction. transformers lists them by number, per family."""
    config = model.config.get_text_config()
    first, count = getattr(config, "num_hidden_layers", None), getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(first, int) or not isinstance(count, int):
        return set()
    return {rf"(^|\.)layers\.{number}\." for number in range(first, first + count)}


def _pattern(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"({pattern})" for pattern in sorted(patterns))
    return re.compile(joined) if joined else None
