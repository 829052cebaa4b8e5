"""Checks of token ids against the embedding. An id beyond it is an error on the CPU, and ends a CUDA context."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel


def num_embeddings(model: TextModel) -> int:
    """Rows of the input embeddings, the upper bound of token ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def check_ids(ids: Sequence[int], num_rows: int, tokenizer: Any = None, text: str = "The prompt") -> None:
    """Check that every token id has an embedding.

    num_rows: of the embedding. text: what has these ids. Raises: ConfigError for an id outside them.
    """
    wrong = next((token_id for token_id in ids if not 0 <= token_id < num_rows), None)
    if wrong is None:
        return
    token = f"{tokenizer.convert_ids_to_tokens(wrong)!r} " if tokenizer is not None and wrong >= 0 else ""
    raise ConfigError(
        f"{text} has token {token}({wrong}), but the model's embedding has {num_rows:,} rows, for tokens 0 to "
        f"{num_rows - 1:,}. Leave it out, or use the tokenizer that belongs to these weights."
    )


def watch_ids(hf: TextModel) -> None:
    """Check ids in every call of the model; on a device only in prompts, because the check waits for the device."""
    num_rows = num_embeddings(hf)

    def check(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if not isinstance(ids, torch.Tensor) or ids.numel() == 0 or ids.is_floating_point():
            return
        if ids.numel() == 1 and ids.device.type == "cpu":
            check_ids((int(ids),), num_rows)
        elif ids.device.type == "cpu" or ids.shape[-1] > 1:
            least, most = ids.aminmax()
            check_ids((int(least), int(most)), num_rows)

    halves = [hf.get_decoder(), *([hf.get_encoder()] if hf.config.is_encoder_decoder else [])]
    for half in halves:
        half.register_forward_pre_hook(check, with_kwargs=True)
