"""The names by which transformers passes and returns a cache: `cache` since 5.24, other ones before.

No other file has them, so that both are supported; the older ones are still taken by newer versions until 5.40.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.modeling_outputs import MoeModelOutputWithPast

OLD, OLD_STATES = "past_key_values", "cache_params"
IS_NEW = OLD not in MoeModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if IS_NEW else OLD  # of models, their outputs, decoder layers and attention
STATES = "cache" if IS_NEW else OLD_STATES  # of linear attention


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument of a forward, or of generate()."""
    return {CACHE: cache}


def with_states(cache: Any) -> dict[str, Any]:
    """The argument of linear attention's forward."""
    return {STATES: cache}


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache that a forward is given by any name; None for none."""
    cache = arguments.get(CACHE)
    return arguments.get(OLD) if cache is None else cache


def states_in(positional: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """The cache that linear attention's forward is given behind its hidden states; None for none."""
    names = [name for name in (STATES, OLD_STATES) if arguments.get(name) is not None]
    return arguments[names[0]] if names else next(iter(positional), None)


def take_cache(arguments: dict[str, Any]) -> Any:
    """`cache_in`, and take it out."""
    cache, old = arguments.pop(CACHE, None), arguments.pop(OLD, None)
    return old if cache is None else cache


def cache_from(output: Any) -> Any:
    """The cache in a model's output, or generate()'s."""
    return getattr(output, CACHE)
