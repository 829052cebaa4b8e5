"""Prompts and stop tokens, from the model's own template and nothing else."""

from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from offload_moe.chat.template import PromptFormat, common_prefix, model_stop_ids
from tests.support.chat import CHATML, byte_tokenizer, chat_model, ids_of

MESSAGES = [{"role": "user", "content": "Hi"}]
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return chat_model()


def stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {tokenizer.convert_ids_to_tokens(token) for token in PromptFormat(model, tokenizer).stop_ids}


def test_stops_are_the_configured_ones_and_what_follows_an_answer(model: PreTrainedModel) -> None:
    assert stops(model, byte_tokenizer()) == {"<|endoftext|>", "<|im_end|>", "<|im_start|>"}


def test_harmony_markers_inside_a_turn_do_not_stop(model: PreTrainedModel) -> None:
    assert stops(model, byte_tokenizer(HARMONY)) == {"<|endoftext|>"}


@pytest.mark.parametrize(("configured", "expected"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_stop_tokens_of_the_generation_config(configured: Any, expected: set[int]) -> None:
    model = chat_model()
    model.generation_config.eos_token_id = configured
    assert model_stop_ids(model, None) == expected


def test_a_template_that_refuses_the_probe_costs_only_its_stops(model: PreTrainedModel) -> None:
    template = "{{ raise_exception('one question only') if messages|length > 1 }}" + CHATML
    assert stops(model, byte_tokenizer(template)) == {"<|endoftext|>"}


def test_raw_ignores_the_template(model: PreTrainedModel) -> None:
    raw = PromptFormat(model, byte_tokenizer(), raw=True)
    assert raw.template is None
    assert raw.render([*MESSAGES, {"role": "assistant", "content": "Ho"}]) == "Hi\nHo"


def test_the_boundary_leaves_the_generation_prompt_out(model: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    format_ = PromptFormat(model, tokenizer)
    ids = format_.encode(format_.render(MESSAGES))
    assert ids[: format_.boundary(MESSAGES, ids)] == ids_of(tokenizer, "<|im_start|>user\nHi<|im_end|>\n")
    plain = PromptFormat(model, byte_tokenizer(None))
    assert plain.boundary(MESSAGES, plain.encode("Hi")) == 1


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
