"""How the tokens of one answer are chosen, and when it ends."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from transformers import GenerationConfig

from offload_moe.chat.sampling import LEAST_TEMPERATURE, NUM_SEEDS, Sampling
from offload_moe.families.text_model import TextModel

LEAST_TOP_P = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """None leaves the choice to the model's generation config, as in `Sampling`.

    logit_bias: by token id. top_logprobs: None gives none, 0 those of the chosen tokens alone.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    ignores_end: bool = False

    def seed_of(self, choice: int) -> int | None:
        """With a seed, each choice draws for itself and repeatably."""
        return None if self.seed is None else (self.seed + choice) % NUM_SEEDS

    def generation_config(self, hf: TextModel, *, stop_ids: Collection[int], max_new_tokens: int) -> GenerationConfig:
        """See `Sampling`; with the filters and penalties that transformers has itself."""
        temperature = self.temperature
        if temperature is not None and temperature < LEAST_TEMPERATURE:
            temperature = 0
        chosen = Sampling(
            temperature=temperature,
            top_p=None if self.top_p is None else max(self.top_p, LEAST_TOP_P),
            top_k=None if self.top_k is None else max(self.top_k, 0),
        )
        config = chosen.generation_config(
            hf, stop_ids=() if self.ignores_end else stop_ids, max_new_tokens=max_new_tokens
        )
        if self.min_p is not None and config.do_sample:
            config.min_p = self.min_p
        if self.repetition_penalty is not None:
            config.repetition_penalty = self.repetition_penalty
        return config
