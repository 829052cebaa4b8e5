"""The model families of the installed transformers and the adapters, read from their source without importing it.

A family is a folder of transformers' `models`. A test compares the table with the families that the tests run.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload_moe.families import ADAPTERS, Adapter
from offload_moe.families.declared import declared_class
from offload_moe.families.layer_classes import FastPath

Verified = Literal["whole model", "contract only", "refused"]

REFUSED = {
    "diffusion_gemma": "writes by diffusion, not one token after another",
    "inkling2_loop": "takes a token through some layers several times",
}
DECORATED = re.compile(r"^@use_experts_implementation(?:\((.*)\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE)
LAYER_CLASS = re.compile(r"^class (\w*DecoderLayer)\(", re.MULTILINE)
# Properties derived from a family's code. The last group is from the arguments of transformers' decorator.
SHARED_EXPERTS = re.compile(r"self\.shared_(?:expert|mlp)|self\.share_expert")
LATENT_ATTENTION = re.compile(r"kv_a_proj_with_mqa")
RECURRENT = re.compile(r"class \w*(?:Mamba|DeltaNet|ShortConv|LightningAttention|LinearAttention|KDA)\w*\(")
ARGUMENTS = {
    "has_bias=True": "biases",
    "has_gate=False": "no gate",
    "is_transposed=True": "transposed",
    "is_concatenated=False": "gate and up interleaved",
    "has_post_expert_norm=True": "norm after each expert",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. classes: its experts. model_types: those in `config.json` of its text-generating models.

    verified: "whole model": tiny random models give eager's bits from prompt to decode, through a converted store;
    "contract only": the experts class alone does, because transformers has no text-generating model around it.
    fast_path: what native decode kernels compute of its layers, see `LayerClass`; "not declared": `load` finds it out.
    """

    name: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    has_adapter: bool
    verified: Verified
    special: tuple[str, ...]
    fast_path: FastPath | Literal["not declared"]


def families() -> list[Family]:
    """Every family with routed experts, by name."""
    adapters = {adapter.family: adapter for adapter in ADAPTERS}
    text_types = _text_types()
    found = []
    for folder in sorted(path for path in _models_folder().iterdir() if path.is_dir()):
        source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py")))
        decorated, adapter = DECORATED.findall(source), adapters.get(folder.name)
        if decorated or adapter is not None:
            found.append(_family(folder.name, source, decorated, adapter, text_types.get(folder.name, {})))
    return found


def _family(
    name: str, source: str, decorated: Sequence[tuple[str, str]], adapter: Adapter | None, types: dict[str, bool]
) -> Family:
    verified: Verified = "whole model" if types else "contract only"
    classes = tuple(kind for _, kind in decorated) + ((adapter.class_name,) if adapter is not None else ())
    return Family(
        name=name,
        classes=classes,
        model_types=tuple(sorted(types)),
        has_adapter=adapter is not None,
        verified="refused" if name in REFUSED else verified,
        special=tuple(_special(name, source, " ".join(arguments for arguments, _ in decorated), adapter, types)),
        fast_path=next(
            (found.fast_path for kind in LAYER_CLASS.findall(source) if (found := declared_class(kind)) is not None),
            "not declared",
        ),
    )


def _special(name: str, source: str, arguments: str, adapter: Adapter | None, types: dict[str, bool]) -> Iterator[str]:
    if name in REFUSED:
        yield REFUSED[name]
    if any(types.values()):
        yield "encoder-decoder"
    for pattern, words in (
        (SHARED_EXPERTS, "shared experts"),
        (LATENT_ATTENTION, "latent attention"),
        (RECURRENT, "recurrent layers"),
    ):
        if pattern.search(source):
            yield words
    yield from (words for argument, words in ARGUMENTS.items() if argument in arguments)
    if adapter is not None and adapter.special:
        yield adapter.special


def _text_types() -> dict[str, dict[str, bool]]:
    """Folder -> model type -> whether it is an encoder-decoder, for every text-generating model type."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    found: dict[str, dict[str, bool]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type in mapping:
            found.setdefault(model_type_to_module_name(model_type), {})[model_type] = False
    for model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        found.setdefault(model_type_to_module_name(model_type), {}).setdefault(model_type, True)
    return found


def _models_folder() -> Path:
    import transformers

    return Path(transformers.__file__).parent / "models"
