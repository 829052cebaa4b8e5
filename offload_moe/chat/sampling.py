"""How the next token is chosen: the user's settings over the model's own generation config."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict

from transformers import GenerationConfig, PreTrainedModel

from offload_moe.errors import ConfigError


class SamplingArguments(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    max_new_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of one answer; None leaves the choice to the model's generation config.

    Temperature 0 is greedy. A top_k of 0 turns that filter off.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda value: 0 <= value <= 100, "from 0 to 100")
        _check_number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        _check_integer("top_k", self.top_k, 0)
        _check_integer("seed", self.seed, 0)
        _check_integer("max_new_tokens", self.max_new_tokens, 1)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From keyword arguments.

        Raises:
            ConfigError: one is unknown or out of range.
        """
        if unknown := set(arguments) - {field.name for field in fields(cls)}:
            known = ", ".join(field.name for field in fields(cls))
            raise ConfigError(f"Unknown setting {', '.join(sorted(unknown))}. The settings are {known}.")
        return cls(**arguments)

    def generation_config(
        self, hf: PreTrainedModel, *, stop_ids: Collection[int], max_new_tokens: int
    ) -> GenerationConfig:
        """The model's generation config with these settings applied, for one sequence and no compilation."""
        config = copy.deepcopy(hf.generation_config)
        config.max_length = None
        config.max_new_tokens = max_new_tokens
        config.num_beams = config.num_return_sequences = 1
        config.use_cache = True
        config.return_dict_in_generate = False
        config.disable_compile = True
        config.eos_token_id = sorted(stop_ids) or None
        if config.pad_token_id is None and stop_ids:
            config.pad_token_id = min(stop_ids)
        self._apply(config)
        return config

    def _apply(self, config: GenerationConfig) -> None:
        chosen = (self.temperature, self.top_p, self.top_k)
        if any(value is not None for value in chosen):
            config.do_sample = self.temperature != 0
        if not config.do_sample:
            # Neutral values: generate() warns about filters that greedy search does not use.
            config.do_sample, config.temperature, config.top_p, config.top_k = False, 1.0, 1.0, 50
            return
        for name, value in zip(("temperature", "top_p", "top_k"), chosen, strict=True):
            if value is not None:
                setattr(config, name, value)


def _check_number(name: str, value: float | None, is_in_range: Callable[[float], bool], wanted: str) -> None:
    if value is None:
        return
    # NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_in_range(value):
        raise ConfigError(f"{name} is {value!r}. It must be a number {wanted}.")


def _check_integer(name: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}. It must be a whole number, at least {least}.")
