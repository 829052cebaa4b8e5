"""Models of extensions, which transformers builds once it has their classes."""

from offload_moe.system.extensions import find_extension


def register_model(model_type: str) -> bool:
    """Give transformers the classes of an extension's model. Returns whether an extension has that model type.

    Raises: ConfigError where the extension is broken.
    """
    extension = find_extension("model", model_type)
    if extension is None:
        return False
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    kind = extension.load()
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not is_model:
        raise extension.fault(f"is {kind!r}, not a subclass of PreTrainedModel")
    with extension.guard():
        AutoConfig.register(model_type, kind.config_class, exist_ok=True)
        AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)
    return True
