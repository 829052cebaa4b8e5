"""A transformers model without its weights: names, shapes and modules, with every parameter on `meta`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from offload_moe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def load_config(folder: Path) -> "PreTrainedConfig":
    """The model's transformers config.

    Raises:
        CheckpointError: not a model folder, or its `config.json` is not usable.
        UnsupportedModelError: the model type needs code that transformers does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = read_config_json(folder)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{folder}: model type {model_type!r} is not in transformers and its config asks for remote code "
                "(auto_map, trust_remote_code=True). Code from a checkpoint is never run."
            )
        raise UnsupportedModelError(f"{folder}: model type {model_type!r} is not in this version of transformers.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of foreign values is the checkpoint's fault
        raise CheckpointError(f"{folder / 'config.json'} is not a usable {model_type} config: {error}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` as it is written. Raises: CheckpointError when this is not a model folder."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path} is not a model config: it names no model_type.")
    return raw


def build_skeleton(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model of this config, parameters on `meta`, buffers real; the config itself is not touched.

    Raises:
        UnsupportedModelError: transformers has no text-generating model for it, or cannot build it.
    """
    from accelerate import init_empty_weights

    model_class = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = model_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # a model class fails in any way it likes on values it did not expect
        raise UnsupportedModelError(f"transformers cannot build this {config.model_type} model: {error}") from error
    stranded = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if stranded:
        raise UnsupportedModelError(f"{type(model).__name__}: buffer {stranded[0]} was left without a value.")
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty` to `meta` at once, so that not even one layer's experts are ever allocated.

    accelerate moves a parameter to `meta` only after it was made: 30 GB for one layer of DeepSeek-V3.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def auto_class(config: "PreTrainedConfig") -> "type[AutoModelForCausalLM]":
    """The auto class that builds a text-generating model of this config. Raises: UnsupportedModelError."""
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"):
        candidate = getattr(transformers, name)
        if type(config) in candidate._model_mapping:
            return candidate
    raise UnsupportedModelError(f"transformers has no text-generating model for model type {config.model_type!r}.")
