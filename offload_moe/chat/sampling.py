"""How the next token is chosen: the user's settings over the model's own generation config."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict, TypeGuard

from transformers import GenerationConfig

from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.speculate.choice import CHOICES, Choice, check_choice

# Logits divided by less overflow.
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-6, 100
GREATEST_COUNT = 2**31 - 1
NUM_SEEDS = 2**64
# The values of each setting, for error messages.
RANGES = {
    "temperature": f"0, or a number from {LEAST_TEMPERATURE:f} to {GREATEST_TEMPERATURE}",
    "top_p": "a number above 0 and at most 1",
    "top_k": f"a whole number from 0 to {GREATEST_COUNT}",
    "seed": f"a whole number from 0 to {NUM_SEEDS - 1}",
    "max_new_tokens": f"a whole number from 1 to {GREATEST_COUNT}",
    "speculate": f"one of {', '.join(CHOICES)}",
}
MAX_SHOWN_BITS = 256


class SamplingArguments(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    max_new_tokens: int | None
    speculate: Choice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of one answer; None leaves the choice to the model's generation config.

    Temperature 0 is greedy. A top_k of 0 turns that filter off. speculate: which tokens are guessed, which changes the
    speed and no token; None leaves it to `LoadOptions`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    speculate: Choice | None = None

    def __post_init__(self) -> None:
        # NaN is in no range.
        _check("temperature", self.temperature, _is_temperature(self.temperature))
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1)
        _check("top_k", self.top_k, _is_integer(self.top_k) and 0 <= self.top_k <= GREATEST_COUNT)
        _check("seed", self.seed, _is_integer(self.seed) and 0 <= self.seed < NUM_SEEDS)
        if self.speculate is not None:
            check_choice(self.speculate)
        _check(
            "max_new_tokens",
            self.max_new_tokens,
            _is_integer(self.max_new_tokens) and 1 <= self.max_new_tokens <= GREATEST_COUNT,
        )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Settings from keyword arguments.

        Raises:
            ConfigError: one is unknown or out of range.
        """
        if unknown := set(arguments) - {field.name for field in fields(cls)}:
            known = ", ".join(field.name for field in fields(cls))
            raise ConfigError(f"Unknown setting {', '.join(sorted(unknown))}. The settings are {known}.")
        return cls(**arguments)

    def generation_config(self, hf: TextModel, *, stop_ids: Collection[int], max_new_tokens: int) -> GenerationConfig:
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
        if self.temperature is not None:
            config.temperature = float(self.temperature)
        if self.top_p is not None:
            config.top_p = float(self.top_p)
        if self.top_k is not None:
            config.top_k = self.top_k


def _check(name: str, value: object, is_in_range: bool) -> None:
    if value is not None and not is_in_range:
        raise ConfigError(f"{name} is {_shown(value)}. It must be {RANGES[name]}.")


def _is_temperature(value: object) -> bool:
    return _is_number(value) and (value == 0 or LEAST_TEMPERATURE <= value <= GREATEST_TEMPERATURE)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value for a message. Python refuses to format integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"an integer of {value.bit_length():,} bits"
    return repr(value)
