"""What a chat template makes of texts: lists of parts, texts it leaves out, failures, answers that are continued."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedModel

from offload_moe.chat import ChatSession
from offload_moe.chat.chat_template import ChatTemplate
from offload_moe.chat.prompt import generate, stream_pieces, stream_tokens
from offload_moe.chat.template import FORGETFUL_TEMPLATE, PromptFormat
from offload_moe.errors import ConfigError
from tests.support.chat import CHATML, END_OF_TEXT, Scripted, byte_tokenizer, chat_model, ids_of

ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PART_LOOP = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
PARTS_ONLY = "{% for m in messages %}[{{ m.role }}]" + PART_LOOP + "<|im_end|>{% endfor %}"
SYSTEM_AS_STRING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'system' %}{{ m.content.strip() }}{% else %}"
    + PART_LOOP
    + "{% endif %}<|im_end|>{% endfor %}"
)
LISTS_OR_ERROR = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('a list, please') }}{% endif %}"
    "[{{ m.role }}]{{ m.content[0].text }}<|im_end|>{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
RENDERED = "[system]be brief<|im_end|>[user]one<|im_end|>[assistant]two<|im_end|>[user]three<|im_end|>"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return chat_model()


def render(model: PreTrainedModel, template: str, messages: list[dict[str, str]]) -> str:
    return PromptFormat(model, byte_tokenizer(template)).render(messages)


@pytest.mark.parametrize("template", [PARTS_ONLY, SYSTEM_AS_STRING, LISTS_OR_ERROR])
def test_templates_that_want_parts_get_them(model: PreTrainedModel, template: str) -> None:
    assert render(model, template, TALK) == RENDERED


def test_a_text_that_is_in_the_template_anyway_is_not_taken_for_rendered(model: PreTrainedModel) -> None:
    assert render(model, PARTS_ONLY, [{"role": "user", "content": "user"}]) == "[user]user<|im_end|>"


@pytest.mark.parametrize("change", ["trim", "upper", "urlencode", "e", "tojson"])
def test_a_text_that_is_changed_is_not_left_out(model: PreTrainedModel, change: str) -> None:
    template = "{% for m in messages %}{{ m.content | " + change + " }}{% endfor %}"
    assert render(model, template, [{"role": "user", "content": " a <b> & ü "}])
    assert ChatTemplate(byte_tokenizer(template)).left_out(TALK) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}ok", "last user message out"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves the system prompt out"),
        ("", "leaves the system prompt out"),
        ("{{ messages[-1].tool | tojson }}" + CHATML, r"fails .*\(TypeError: Object of type Undefined"),
        ("{{ messages[9].content.text }}", r"fails .*\(UndefinedError"),
        ("{{ 1 // 0 }}", r"fails .*\(ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", r"fails .*\(SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails .*\(RecursionError"),
        ("{% for m in messages %}", r"fails .*\(TemplateSyntaxError"),
        ("{{ raise_exception('No system role') }}", "refuses this conversation: No system role"),
    ],
)
def test_what_cannot_be_rendered_is_an_error(model: PreTrainedModel, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(model, template, TALK)


@pytest.mark.parametrize("printed", ["m.content[:3]", "m.content[2:]", "m.content | first"])
def test_a_list_that_is_printed_is_no_text(model: PreTrainedModel, printed: str) -> None:
    """A template that loses the string must not answer by the list of parts as Python writes it."""
    template = "{% for m in messages %}[{{ " + printed + " }}]{% endfor %}"
    with pytest.raises(ConfigError, match="leaves the text of the last user message out"):
        render(model, template, [{"role": "user", "content": "question"}])


def test_a_conversation_as_json_is_text(model: PreTrainedModel) -> None:
    assert '"content": "question"' in render(
        model, "{{ messages | tojson }}", [{"role": "user", "content": "question"}]
    )


def test_earlier_turns_that_are_left_out_are_said(model: PreTrainedModel) -> None:
    forgetful = "{{ messages[0].content if messages[0].role == 'system' }}{{ messages[-1].content }}"
    assert PromptFormat(model, byte_tokenizer(forgetful)).notice == FORGETFUL_TEMPLATE
    assert render(model, forgetful, TALK) == "be briefthree"
    assert PromptFormat(model, byte_tokenizer()).notice is None


def test_dropped_reasoning_is_no_fault(model: PreTrainedModel) -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }};{% endfor %}"
    talk = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>two"}, TALK[3]]
    assert render(model, template, talk) == "be brief;one;two;three;"


def test_named_templates_without_a_default(model: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ConfigError, match="chat templates rag, tool_use, and none is the default"):
        PromptFormat(model, tokenizer)
    assert PromptFormat(model, tokenizer, raw=True).render(TALK[1:2]) == "one"
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    assert "one" in PromptFormat(model, tokenizer).render(TALK[1:2])


def test_an_empty_prompt_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        generate(model, byte_tokenizer(), "", raw=True)
    with pytest.raises(ConfigError, match="no tokens"):
        stream_tokens(model, None, torch.zeros(1, 0, dtype=torch.long))
    blind = byte_tokenizer(None)
    blind.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ConfigError, match="3 characters, of which the tokenizer keeps none"):
        generate(model, blind, " \n ", raw=True)


def test_text_that_is_no_text_leaves_the_conversation_alone(model: PreTrainedModel) -> None:
    session = ChatSession(model, byte_tokenizer())
    list(session.send("fine", max_new_tokens=1, temperature=0))
    kept = list(session.messages)
    assert len(kept) == 2
    with pytest.raises(ConfigError, match="user message has byte 0xe9"):
        list(session.send("caf\udce9"))
    with pytest.raises(ConfigError, match="content of message 1 has the lone surrogate"):
        session.send([{"role": "user", "content": "\ud800"}])
    assert session.messages == kept
    session.system = "\udcff"
    with pytest.raises(ConfigError, match="system message has byte 0xff"):
        list(session.send("x"))


def test_files_of_conversations_hold_text(model: PreTrainedModel, tmp_path: Path) -> None:
    session = ChatSession(model, byte_tokenizer(), system="\udcff")
    with pytest.raises(ConfigError, match="system prompt has byte 0xff"):
        session.save(tmp_path / "talk.json")
    assert not list(tmp_path.iterdir())
    document = {"format": "offload-moe chat 1", "system": None, "messages": [{"role": "user", "content": "Zürich"}]}
    (tmp_path / "utf16.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-16")
    session.load(tmp_path / "utf16.json")
    assert session.messages[0]["content"] == "Zürich"
    (tmp_path / "half.json").write_text(json.dumps(document).replace(r"Z\u00fcrich", r"\ud83d"))
    with pytest.raises(ConfigError, match="lone surrogate"):
        session.load(tmp_path / "half.json")
    assert session.messages[0]["content"] == "Zürich"


BEGUN = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\nOne, two,"),
        (PARTS_ONLY, "[user]Count.<|im_end|>[assistant]One, two,"),
    ],
)
def test_a_last_assistant_message_is_continued(model: PreTrainedModel, template: str, expected: str) -> None:
    assert render(model, template, BEGUN) == expected
    empty = [BEGUN[0], {"role": "assistant", "content": " "}]
    assert render(model, CHATML, empty).endswith("Count.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("begun", "said", "reasoning", "answer", "kept"),
    [
        ("One, two,", " three.", "", " three.", {"content": "One, two, three."}),
        (
            "<think>\nOkay",
            " so.</think>\nThree",
            " so.",
            "Three",
            {"content": "Three", "reasoning_content": "\nOkay so."},
        ),
        (
            "<think>hm</think>Well,",
            " <think> is a tag",
            "",
            " <think> is a tag",
            {"content": "<think>hm</think>Well, <think> is a tag"},
        ),
    ],
)
def test_the_stream_is_what_follows_it(
    begun: str, said: str, reasoning: str, answer: str, kept: dict[str, str]
) -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    script = Scripted(model, [*ids_of(tokenizer, said), END_OF_TEXT])
    messages = [BEGUN[0], {"role": "assistant", "content": begun}]
    session = ChatSession(model, tokenizer)
    pieces = list(session.send(messages, temperature=0))
    for kind, expected in (("reasoning", reasoning), ("answer", answer)):
        assert "".join(piece.text for piece in pieces if piece.kind == kind) == expected
    assert session.messages == [BEGUN[0], {"role": "assistant"} | kept]
    script.num_calls = 0
    assert generate(model, tokenizer, messages, temperature=0) == answer


def test_harmony_answers_are_continued() -> None:
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    model, tokenizer = chat_model(), byte_tokenizer(template)
    Scripted(model, [*ids_of(tokenizer, " three."), END_OF_TEXT])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = list(stream_pieces(model, tokenizer, BEGUN, temperature=0))
    assert [piece.kind for piece in pieces] == ["answer"] * len(pieces)
    assert "".join(piece.text for piece in pieces) == " three."
