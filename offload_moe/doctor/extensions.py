"""What other packages add to this one."""

from collections.abc import Callable, Collection, Mapping

from offload_moe.checkpoint.extended import register_model
from offload_moe.doctor.check import Check, judge
from offload_moe.errors import ConfigError
from offload_moe.families import ADAPTERS
from offload_moe.families.declared import declared_class
from offload_moe.families.extended import extended_adapter
from offload_moe.families.layer_classes import LAYERS
from offload_moe.profile.belady import Belady
from offload_moe.quant import CODECS, GGUF, get_codec
from offload_moe.residency.policy import POLICY_NAMES, check_policy
from offload_moe.system.extensions import Extension, Kind, installed

Built = tuple[Collection[str], Callable[[str], object]]
"""The built-in names of a kind, and what raises a ConfigError for the name of a broken extension."""


def check_extensions() -> list[Check]:
    """One check per extension, which is imported, and per package whose entry points cannot be read."""
    found = installed()
    checks = [check_extension(extension, _kinds()) for extension in found.extensions]
    checks += [
        judge("extensions", f"unreadable entry points of {text}", warning="Update that package, or uninstall it.")
        for text in found.unreadable
    ]
    return checks or [judge("extensions", "none are installed")]


def check_extension(extension: Extension, kinds: Mapping[Kind, Built]) -> Check:
    """Import an extension and check what its kind demands."""
    built_in, check = kinds[extension.kind]
    found = f"{extension.kind} {extension.name} of {extension.distribution}, in {extension.folder}"
    if extension.name in built_in:
        return judge("extension", found, warning="It is not used: that name is built in. Its package must rename it.")
    try:
        check(extension.name)
    except ConfigError as error:
        return judge("extension", found, problem=str(error))
    return judge("extension", found)


def _kinds() -> Mapping[Kind, Built]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {
        "policy": ((*POLICY_NAMES, Belady.name), check_policy),
        "model": (CONFIG_MAPPING_NAMES, register_model),
        "layer": (LAYERS, declared_class),
        "codec": ((*CODECS, GGUF), get_codec),
        "adapter": ([adapter.class_name for adapter in ADAPTERS], extended_adapter),
    }
