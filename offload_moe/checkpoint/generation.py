"""A model's default sampling: `generation_config.json`, or the settings in the model's config."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_moe.families.text_model import TextModel
from offload_moe.system.paths import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def load_generation_config(folder: Path, model: TextModel) -> "tuple[GenerationConfig, str | None]":
    """The settings, and a notice if the file exists but is not usable; then it is left out, as in transformers.

    model: or its skeleton, with which they are tried; transformers would fail at the first answer.

    Source: transformers/generation/utils.py, `adjust_generation_fn`.
    """
    from transformers import GenerationConfig

    notice = None
    if (folder / GENERATION_CONFIG).is_file():
        try:
            config = GenerationConfig.from_pretrained(folder)
            _try(model, config)
        except Exception as error:  # a config class may raise anything for foreign values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notice = (
                f"{folder / GENERATION_CONFIG} cannot be used ({reason.rstrip('.')}) and is left out: answers are "
                "drawn with transformers' defaults. Download that file again for the model's own."
            )
        else:
            return config, None
    return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True), notice


def _try(model: TextModel, config: "GenerationConfig") -> None:
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
