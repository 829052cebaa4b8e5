"""What this package uses of transformers, looked for in the one that is installed: drifts are named with their place.

Imports, attributes of modules and keywords of calls are found in the sources; what is used on objects is listed here.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from offload_moe.families.cache_name import CACHE, OLD, OLD_STATES, STATES, cache_in, take_cache
from offload_moe.families.layer_classes import LAYERS

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("offload_moe", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
# Attributes and methods of objects: where they are looked for, and the file that relies on them.
ATTRIBUTES = {
    "transformers.generation.utils:GenerationMixin": {
        "_get_logits_processor": "offload_moe/checkpoint/generation.py",
        "_prefill": "offload_moe/chat/recompute.py",
        "_prepare_special_tokens": "offload_moe/checkpoint/generation.py",
        "_supports_default_dynamic_cache": "offload_moe/chat/prefix.py",
        "_update_model_kwargs_for_generation": "offload_moe/chat/steps.py",
        "prepare_inputs_for_generation": "offload_moe/chat/recompute.py",
    },
    "transformers:PreTrainedModel": {
        "_get_dtype_plan": "offload_moe/checkpoint/skeleton.py",
        "_keys_to_ignore_on_load_missing": "offload_moe/checkpoint/names.py",
        "_keys_to_ignore_on_load_unexpected": "offload_moe/checkpoint/names.py",
        "_tied_weights_keys": "offload_moe/checkpoint/weights.py",
        "get_decoder": "offload_moe/decode/head.py",
        "get_output_embeddings": "offload_moe/decode/head.py",
    },
    "transformers:GenerationConfig": {"_get_default_generation_params": "offload_moe/checkpoint/generation.py"},
    "transformers:DynamicCache": {
        "get_seq_length": "offload_moe/decode/forward.py",
        "update": "offload_moe/decode/attention.py",
        "crop": "offload_moe/decode/cache.py",
    },
}
# Parameters by name, of every decoder layer that is declared, its attention, its decoder and its model with a head.
PARAMETERS = {
    "layer": {
        "position_embeddings": "offload_moe/decode/plan.py",
        CACHE: "offload_moe/families/cache_name.py",
        "attention_mask": "offload_moe/decode/plan.py",
    },
    "attention": {
        "position_embeddings": "offload_moe/decode/attention.py",
        CACHE: "offload_moe/families/cache_name.py",
        "attention_mask": "offload_moe/decode/attention.py",
    },
    "decoder": {
        "input_ids": "offload_moe/decode/wiring.py",
        "position_ids": "offload_moe/decode/forward.py",
        CACHE: "offload_moe/families/cache_name.py",
        "use_cache": "offload_moe/decode/forward.py",
    },
    "model": {
        "input_ids": "offload_moe/chat/steps.py",
        "position_ids": "offload_moe/chat/steps.py",
        "attention_mask": "offload_moe/chat/steps.py",
        CACHE: "offload_moe/families/cache_name.py",
        "logits_to_keep": "offload_moe/chat/steps.py",
    },
    "linear attention": {STATES: "offload_moe/families/cache_name.py"},
}
SUFFIXES = {
    "layer": "DecoderLayer",
    "attention": "Attention",
    "decoder": "Model",
    "model": "ForCausalLM",
    "linear attention": "GatedDeltaNet",
}
OUTPUTS = {
    "modeling_outputs:MoeModelOutputWithPast": "offload_moe/decode/wiring.py",
    "modeling_outputs:MoeCausalLMOutputWithPast": "offload_moe/chat/steps.py",
    "generation.utils:GenerateDecoderOnlyOutput": "tests/integration/test_decode.py",
}


@dataclass(frozen=True, kw_only=True)
class Use:
    """A name of transformers: `module`, a name in it or none, and a keyword that it is called with or none."""

    module: str
    name: str
    keyword: str
    place: str


def uses_in(path: Path) -> Iterator[Use]:
    tree, place = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] == "transformers":
                imported |= {each.asname or each.name: (module, each.name) for each in node.names}
            case ast.Import():
                imported |= {each.name: (each.name, "") for each in node.names if each.name == "transformers"}
    for module, name in imported.values():
        yield Use(module=module, name=name, keyword="", place=place)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if is_module(imported.get(owner)):
                module, name = imported[owner]
                yield Use(
                    module=f"{module}.{name}".rstrip("."), name=attribute, keyword="", place=f"{place}:{node.lineno}"
                )
            case ast.Call(func=ast.Name(id=called), keywords=keywords) if called in imported:
                module, name = imported[called]
                for keyword in keywords:
                    if keyword.arg:
                        yield Use(module=module, name=name, keyword=keyword.arg, place=f"{place}:{node.lineno}")


def is_module(found: tuple[str, str] | None) -> bool:
    return found is not None and isinstance(value_of(*found), ModuleType)


@cache
def value_of(module: str, name: str) -> Any:
    """None where it is not there."""
    try:
        value = import_module(module)
        return getattr(value, name) if name else value
    except (ImportError, AttributeError):
        return None


@cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str] | None:
    """None where every name is taken."""
    found = inspect.signature(function).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found):
        return None
    return frozenset(each.name for each in found)


def named_parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Without those that are passed on."""
    return frozenset(each.name for each in inspect.signature(function).parameters.values() if each.kind not in VARIABLE)


def assert_none(drifted: list[str]) -> None:
    if drifted:
        lines = "\n".join(f"- {each}" for each in dict.fromkeys(drifted))
        pytest.fail(
            f"transformers {transformers.__version__} is not what this package was written for:\n{lines}", pytrace=False
        )


def drift_of(use: Use) -> str:
    found = value_of(use.module, use.name)
    if found is None:
        return f"{use.module} has no {use.name}, which {use.place} uses"
    accepted = parameters_of(found) if use.keyword else None
    if accepted is not None and use.keyword not in accepted:
        return f"{use.module}.{use.name} takes no {use.keyword}, which {use.place} passes"
    return ""


def test_what_is_imported_and_called_is_there() -> None:
    uses = [use for path in SOURCES for use in uses_in(path)]
    assert len(uses) > 150
    assert sum(bool(use.keyword) for use in uses) > 5
    assert_none([found for use in uses if (found := drift_of(use))])


def test_a_drift_is_named_with_its_place() -> None:
    gone = Use(module="transformers.cache_utils", name="ElasticLayer", keyword="", place="offload_moe/x.py")
    assert drift_of(gone) == "transformers.cache_utils has no ElasticLayer, which offload_moe/x.py uses"
    other = Use(module="transformers", name="DynamicCache", keyword="elastic", place="offload_moe/x.py:7")
    assert drift_of(other) == "transformers.DynamicCache takes no elastic, which offload_moe/x.py:7 passes"
    with pytest.raises(
        pytest.fail.Exception, match=f"transformers {transformers.__version__} is not .*\n- {drift_of(gone)}"
    ):
        assert_none([drift_of(gone)])


def test_attributes_of_objects_are_there() -> None:
    drifted = []
    for owner, names in ATTRIBUTES.items():
        found = value_of(*owner.split(":"))
        for name, place in names.items():
            assert name in (ROOT / place).read_text(encoding="utf-8"), f"{place} uses no {name}: mend this list"
            if not hasattr(found, name):
                drifted.append(f"{owner.replace(':', '.')} has no {name}, which {place} uses")
    assert_none(drifted)


def declared(kind: str) -> Iterator[type]:
    """The classes of this kind that belong to the declared decoder layers."""
    for name, module in modeling_modules().items():
        found = getattr(import_module(module), name.removesuffix("DecoderLayer") + SUFFIXES[kind], None)
        if found is not None:
            yield found


@cache
def modeling_modules() -> dict[str, str]:
    """The module of each declared layer."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        names = (name for name in LAYERS if f"class {name}(" in text)
        found |= dict.fromkeys(names, f"transformers.models.{path.parent.name}.{path.stem}")
    return found


@pytest.mark.parametrize("kind", PARAMETERS)
def test_forwards_take_what_is_passed(kind: str) -> None:
    classes = list(declared(kind))
    assert len(classes) > (1 if kind == "linear attention" else 15)
    drifted = []
    for name, place in PARAMETERS[kind].items():
        assert name in (ROOT / place).read_text(encoding="utf-8"), f"{place} uses no {name}: mend this list"
        without = [each for each in classes if name not in named_parameters(each.forward)]
        if len(without) > len(classes) // 2:  # some take it among others
            takes = ", ".join(sorted(named_parameters(without[0].forward) - {"self"}))
            drifted.append(
                f"the forward of {len(without)} of {len(classes)} classes ({without[0].__name__}, ...) has no "
                f"parameter {name}, which {place} passes; it has {takes}"
            )
    assert_none(drifted)


def test_outputs_have_a_cache() -> None:
    drifted = []
    for name, place in OUTPUTS.items():
        module, name = name.split(":")
        fields = value_of(f"transformers.{module}", name).__dataclass_fields__
        if CACHE not in fields:
            drifted.append(f"{name} has no {CACHE}, which {place} reads; it has {', '.join(fields)}")
    assert_none(drifted)


@pytest.mark.parametrize(("name", "passed"), [(CACHE, 1), (OLD, 1), ("use_cache", None)])
def test_a_cache_is_found_by_either_name(name: str, passed: int | None) -> None:
    arguments = {"input_ids": 0, name: 1}
    assert cache_in(arguments) == passed
    assert take_cache(arguments) == passed
    assert arguments == ({"input_ids": 0} if passed else {"input_ids": 0, name: 1})


def test_no_other_file_has_the_names_of_a_cache() -> None:
    """The tests, too: newer versions warn of the older names."""
    allowed = (ROOT / "offload_moe/families/cache_name.py", Path(__file__))
    folders = ("offload_moe", "cli", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path not in allowed]
    assert len(files) > 500
    assert [path for path in files if any(name in path.read_text(encoding="utf-8") for name in (OLD, OLD_STATES))] == []
