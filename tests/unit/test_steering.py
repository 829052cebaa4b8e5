"""Hooks of the step loop: processors, observed logits, and runs of forced tokens."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from offload_moe.chat.steering import Steering
from offload_moe.chat.stream import TokenStream
from tests.support.chat import chat_model
from tests.unit.test_steps import FAMILIES, PROMPT, config_of, expected, tokens_of

RUN = [65, 66, 67]


class Only(LogitsProcessor):
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.tokens] = scores[:, self.tokens]
        return masked


class RunAfter:
    """A run behind the token with this number."""

    def __init__(self, number: int) -> None:
        self.number, self.num_asked = number, 0

    def __call__(self) -> list[int]:
        self.num_asked += 1
        return RUN if self.num_asked == self.number else []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 3])
def test_a_forced_run_is_continued_like_any_other_text(family: str, number: int) -> None:
    model = chat_model(family, **FAMILIES[family])
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run = RunAfter(number)
    tokens = tokens_of(model, config_of(model), steering=Steering(forced=run))
    if not run.num_asked:  # a family whose state several tokens at once do not continue exactly
        assert family == "granitemoehybrid" or "mamba" in type(model).__name__.lower()
        return
    assert tokens[number : number + 3] == RUN
    assert 4 in calls  # the token before it and the run, together
    before = torch.tensor([tokens[: number + 3]])
    rest = config_of(model, max_new_tokens=14 - number - 3)
    assert tokens[number + 3 :] == expected(model, rest, torch.cat((PROMPT, before), 1))


def test_a_run_ends_at_a_stop_token_and_at_the_limit() -> None:
    model = chat_model()
    stop = tokens_of(model, config_of(model, eos_token_id=66), steering=Steering(forced=RunAfter(1)))
    assert stop[1:] == [65, 66]
    assert len(tokens_of(model, config_of(model, max_new_tokens=3), steering=Steering(forced=RunAfter(1)))) == 3


def test_processors_choose_and_observers_see_the_models_own_logits() -> None:
    model = chat_model()
    plain: list[torch.Tensor] = []
    first = tokens_of(model, config_of(model, max_new_tokens=1), steering=Steering(observe=plain.append))
    assert int(plain[0].argmax()) == first[0]
    seen: list[torch.Tensor] = []
    steering = Steering(processors=[Only([70, 71])], observe=seen.append)
    tokens = tokens_of(model, config_of(model), steering=steering)
    assert set(tokens) <= {70, 71}
    assert torch.equal(seen[0], plain[0])
    assert len(seen) == len(tokens)


def test_steps_show_the_parts_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.chat.prompt_chunks.CPU_PROMPT_TOKENS", 4)
    model = chat_model()
    steps: list[Any] = []
    with TokenStream(model, PROMPT, config_of(model, max_new_tokens=2)) as stream:
        steps += [stream.step() for _ in range(4)]
        with pytest.raises(StopIteration):
            stream.step()
    assert steps[:2] == [None, None]
    assert steps[2:] == stream.tokens
