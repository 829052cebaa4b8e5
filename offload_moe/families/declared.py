"""The declarations of decoder layer classes: those of `layer_classes`, and of extensions, by class name."""

from contextlib import AbstractContextManager, nullcontext

from offload_moe.families.layer_classes import LAYERS, LayerClass
from offload_moe.system.extensions import find_extension


def declared_class(name: str) -> LayerClass | None:
    """The declaration of a layer class; None where it has none. Raises: ConfigError for a broken extension."""
    if name in LAYERS:
        return LAYERS[name]
    extension = find_extension("layer", name)
    if extension is None:
        return None
    declared = extension.load()
    if not isinstance(declared, LayerClass):
        raise extension.fault(f"is {type(declared).__name__}, not a LayerClass")
    return declared


def guard_of(name: str) -> AbstractContextManager[None]:
    """Around the use of a declaration: errors of one that is an extension's name the distribution."""
    extension = None if name in LAYERS else find_extension("layer", name)
    return nullcontext() if extension is None else extension.guard()
