"""The sampling fields of a request as `Settings`."""

from collections.abc import Mapping
from typing import Any

from offload_moe.serve.errors import invalid
from offload_moe.serve.schemas import given
from offload_moe.serve.settings import Settings

NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
COUNTS = ("top_k", "seed")


def settings_of(document: Mapping[str, Any], *, max_tokens: int | None, top_logprobs: int | None = None) -> Settings:
    """Of a checked document. Raises: ApiError."""
    chosen: dict[str, Any] = {name: float(value) for name, value in given(document, NUMBERS).items()}
    chosen |= {name: int(value) for name, value in given(document, COUNTS).items()}
    return Settings(
        **chosen,
        max_tokens=None if max_tokens is None else int(max_tokens),
        stop=texts(document.get("stop")),
        logit_bias=_bias(document.get("logit_bias") or {}),
        top_logprobs=None if top_logprobs is None else int(top_logprobs),
        ignores_end=bool(document.get("ignore_eos")),
    )


def texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _bias(given_bias: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for name, value in given_bias.items():
        if not (name.isascii() and name.isdigit()) or len(name) > 9:
            raise invalid(f"logit_bias has the key {name[:60]!r}. Its keys are token ids.", "logit_bias")
        bias[int(name)] = float(value)
    return bias


def check_bias(settings: Settings, num_logits: int) -> None:
    """Refuse a bias of tokens that the model does not have. Raises: ApiError."""
    unknown = [token for token in settings.logit_bias if token >= num_logits]
    if unknown:
        raise invalid(f"logit_bias names token {unknown[0]}, and the model has {num_logits}.", "logit_bias")
