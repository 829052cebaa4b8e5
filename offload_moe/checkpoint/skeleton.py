"""A transformers model without its weights: names, shapes and modules, with every parameter on `meta`."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from offload_moe.checkpoint.extended import register_model
from offload_moe.checkpoint.json_file import read_json
from offload_moe.errors import CheckpointError, UnsupportedModelError
from offload_moe.families.text_model import TextModel
from offload_moe.system.paths import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

EXPERTS_SIZED = 1 << 24  # elements
FAR = 1 << 24  # a position beyond every window
FILLS = {
    *("normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"),
    *("constant_", "zeros_", "ones_", "fill_", "zero_"),
}


def load_config(folder: Path) -> "PreTrainedConfig":
    """The model's transformers config; a foreign model type is read as the transformers architecture in the config.

    For example, Kimi K2 has the type `kimi_k2` and DeepSeek-V3's architecture.

    Raises:
        CheckpointError: not a model folder, or its `config.json` is not usable.
        UnsupportedModelError: the model type needs code that neither transformers nor an extension has.
        ConfigError: an extension has it and is broken.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = read_config_json(folder)
    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING and not register_model(model_type):
        if (config := _config_by_architecture(folder, raw)) is not None:
            return config
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{folder}: model type {model_type!r} is not in transformers and its config needs remote code "
                "(auto_map, trust_remote_code=True). Code from a checkpoint is never run."
            )
        raise UnsupportedModelError(
            f"{folder}: model type {model_type!r} is neither in this version of transformers nor registered by an "
            "installed package."
        )
    try:
        known: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything for foreign values
        raise CheckpointError(f"{folder / 'config.json'} is not a usable {model_type} config: {error}") from error
    return known


def _config_by_architecture(folder: Path, raw: dict[str, Any]) -> "PreTrainedConfig | None":
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    known = {name: model_type for model_type, name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    if not isinstance(architecture, str) or architecture not in known:
        return None
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(known[architecture], **fields)
    except Exception as error:  # as in load_config: a config class may raise anything
        raise CheckpointError(f"{folder / 'config.json'} is not a usable {architecture} config: {error}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` as it is written. Raises: CheckpointError when this is not a model folder."""
    path = folder / CONFIG_NAME
    raw = read_json(path, f"{folder} is not a model folder: it has no config.json.")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path} is not a model config: it names no model_type.")
    return raw


def build_skeleton(config: "PreTrainedConfig") -> TextModel:
    """The model of this config, with parameters on `meta` and real buffers; the config itself is not modified.

    The model is unquantized, even if its checkpoint is quantized, because weights are read as numbers.

    Raises:
        UnsupportedModelError: transformers has no text-generating model for it, or cannot build it; or a layer runs
            several times for one token.
    """
    from accelerate import init_empty_weights

    model_class = auto_class(config)
    num_passes = getattr(config.get_text_config(), "loop_num_passes", 1)
    if num_passes > 1:
        raise UnsupportedModelError(
            f"{config.model_type} models take a token through some layers several times, this one {num_passes} times. "
            "Only models that run each layer once are supported."
        )
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model: TextModel = model_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model class may raise anything for unexpected values
        raise UnsupportedModelError(f"transformers cannot build this {config.model_type} model: {error}") from error
    _name_decoders(model)
    _rotate_far(model)
    stranded = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if stranded:
        raise UnsupportedModelError(f"{type(model).__name__}: buffer {stranded[0]} was left without a value.")
    model.eval()
    return model


def _name_decoders(model: nn.Module) -> None:
    """Let `get_decoder` find Llama 4's decoder, which it otherwise takes the whole model for.

    The name is an attribute beside the submodules, so that names of tensors stay as they are.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        inner = getattr(module, "model", None)
        if (
            isinstance(module, PreTrainedModel)
            and isinstance(inner, PreTrainedModel)
            and module.get_decoder() is module
        ):
            vars(module)["decoder"] = inner


def skeleton_in(folder: Path, dtype: torch.dtype) -> TextModel:
    """The skeleton of a folder's model, computing in this dtype. The config is read anew: two models share nothing."""
    config = load_config(folder)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:  # a multimodal model's language model has a dtype of its own
            part.dtype = dtype
    return build_skeleton(config)


def _rotate_far(model: "PreTrainedModel") -> None:
    """Use the second factors of LongRoPE once: a list that does not fit would fail in the middle of a long answer.

    Raises: UnsupportedModelError.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                rotary = copy.deepcopy(module)  # it keeps the factors that it used last
                settings = {} if layer_type is None else {"layer_type": layer_type}
                try:
                    rotary(torch.zeros(1, 1, 1), torch.full((1, 1), FAR), **settings)
                except Exception as error:  # as above
                    raise UnsupportedModelError(
                        f"The config of this {model.config.model_type} model has LongRoPE factors (long_factor) that "
                        f"cannot be used: {error}. Take the config.json that its authors published."
                    ) from error


class _EmptyOnMeta(TorchFunctionMode):
    """Redirects `torch.empty` to `meta`, so that not even one layer's experts are allocated.

    accelerate moves a parameter to `meta` only after its allocation: 30 GB for one layer of DeepSeek-V3. Llama 4 fills
    its experts with zeros, 5 GB per layer; smaller zeros may be buffers, whose values count. Tensors on `meta` need no
    initial values, which otherwise take half of the time.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if getattr(func, "__name__", "") in FILLS:
            filled = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        if func is torch.empty or (func is torch.zeros and _num_elements(args) >= EXPERTS_SIZED):
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def _num_elements(size: tuple[Any, ...]) -> int:
    """Elements of the tensor that a factory function makes from these arguments."""
    dims = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return math.prod(dims) if all(isinstance(dim, int) for dim in dims) else 0


def auto_class(config: "PreTrainedConfig") -> "type[AutoModelForCausalLM]":
    """The auto class that builds a text-generating model of this config. Raises: UnsupportedModelError."""
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"):
        candidate: type[AutoModelForCausalLM] = getattr(transformers, name)
        if type(config) in candidate._model_mapping:
            return candidate
    raise UnsupportedModelError(f"transformers has no text-generating model for model type {config.model_type!r}.")


class DtypePlan:
    """Which dtype each dense tensor is computed in: the skeleton's, except what the model class keeps in fp32.

    Source: transformers/core_model_loading.py, `convert_and_load_state_dict_in_model` step 3.
    """

    def __init__(self, hf: TextModel, dtype: torch.dtype) -> None:
        from transformers.core_model_loading import build_glob_alternation

        plan = hf._get_dtype_plan(dtype)
        self._kept = build_glob_alternation(list(plan))[0] if plan else None

    def of(self, name: str, skeleton_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._kept is not None and self._kept.search(name) else skeleton_dtype
