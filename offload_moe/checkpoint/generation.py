"""How a model answers where the user does not say: `generation_config.json`, or what the model's config says of it."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

GENERATION_CONFIG = "generation_config.json"


def load_generation_config(folder: Path, model: "PreTrainedModel") -> "tuple[GenerationConfig, str | None]":
    """The settings, and a notice where the file is there and cannot be used: then it is left out, as in transformers.

    model: or its skeleton, with which they are tried; transformers would fail at the first answer.

    Source: transformers/generation/utils.py, `adjust_generation_fn`.
    """
    from transformers import GenerationConfig

    notice = None
    if (folder / GENERATION_CONFIG).is_file():
        try:
            config = GenerationConfig.from_pretrained(folder)
            _try(model, config)
        except Exception as error:  # whatever these make of foreign values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notice = (
                f"{folder / GENERATION_CONFIG} cannot be used ({reason.rstrip('.')}) and is left out: answers are "
                "drawn with transformers' defaults. Download that file again for the model's own."
            )
        else:
            return config, None
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True), notice


def _try(model: "PreTrainedModel", config: "GenerationConfig") -> None:
    """Make of the settings what the first step of an answer makes of them. Raises: what that raises."""
    from transformers import LogitsProcessorList

    settings = copy.deepcopy(config)
    settings.update(**settings._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=torch.device("cpu"))
    model._get_logits_processor(
        generation_config=settings,
        input_ids_seq_length=1,
        encoder_input_ids=torch.zeros(1, 1, dtype=torch.long),
        logits_processor=LogitsProcessorList(),
        device="cpu",
        model_kwargs={},
    )
