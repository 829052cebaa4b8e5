"""A loaded model cannot be written or copied: its experts are in the store, not in the module."""

from typing import Any, NoReturn

from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel

WRITERS = ("save_pretrained", "push_to_hub", "__reduce_ex__")  # the last one: torch.save, pickle, copy.deepcopy


def refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    """Stands in place of the methods that write a model. Raises: ConfigError."""
    raise ConfigError(
        "A loaded model cannot be saved, copied or pickled: its experts stay in the store, so what is written would "
        "lack most weights. Copy the store's folder (model.store.path), use the checkpoint it was made from, or load() "
        "again in the other process."
    )


def refuse_saving(hf: TextModel) -> None:
    """Make a transformers model refuse to be saved, pickled or copied."""
    for name in WRITERS:
        setattr(hf, name, refuse_to_save)
