"""A model's default sampling: `generation_config.json`, or the settings in the model's config."""

from pathlib import Path
from typing import TYPE_CHECKING

from offload_moe.system.paths import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def load_generation_config(folder: Path) -> "tuple[GenerationConfig, str | None]":
    """The settings, and a notice if the file exists but is not usable; then it is left out, as in transformers.

    Source: transformers/generation/utils.py, `adjust_generation_fn`.
    """
    from transformers import GenerationConfig

    notice = None
    if (folder / GENERATION_CONFIG).is_file():
        try:
            return GenerationConfig.from_pretrained(folder), None
        except Exception as error:  # a config class may raise anything for foreign values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notice = (
                f"{folder / GENERATION_CONFIG} cannot be used ({reason.rstrip('.')}) and is left out, as transformers "
                "does: answers are drawn with its defaults. Download that file again for the model's own."
            )
    return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True), notice
