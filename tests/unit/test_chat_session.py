"""A conversation: what is kept, what is not computed again, and that the reuse changes nothing."""

import json
import time
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from offload_moe.chat import ChatSession, Piece
from offload_moe.chat.prefix import CONTINUED_FAMILIES, PrefixCache
from offload_moe.chat.stream import TokenStream
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.families.cache_name import with_cache
from offload_moe.residency.counters import Counters
from tests.support.chat import CHATML, END_OF_TEXT, Scripted, byte_tokenizer, chat_model, ids_of

GREEDY = {"temperature": 0, "max_new_tokens": 12}
# Keeps reasoning out of earlier turns and opens it in the generation prompt, as DeepSeek-R1's template does.
FORGETS_REASONING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def text_of(pieces: Iterable[Piece], kind: str = "answer") -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def fresh_answer(
    session: ChatSession, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str
) -> str:
    """The answer to the last question of `session`, computed from the beginning."""
    fresh = ChatSession(model, tokenizer, system=session.system)
    fresh.messages = session.messages[:-2]
    answer = text_of(fresh.send(question, **GREEDY))
    assert fresh.last_stats.num_reused_tokens == 0
    return answer


@pytest.mark.parametrize("template", [CHATML, FORGETS_REASONING], ids=["chatml", "forgets_reasoning"])
@pytest.mark.parametrize(
    ("family", "reuse"), [("llama", "cropped"), ("gpt_oss", "snapshot"), ("qwen3_next", "snapshot")]
)
def test_earlier_turns_are_not_computed_again_and_nothing_changes(family: str, reuse: str, template: str) -> None:
    model, tokenizer = chat_model(family), byte_tokenizer(template)
    session = ChatSession(model, tokenizer, system="Be brief.")
    num_prompt_tokens = 0
    for question in ("hello there", "and a second question", "third"):
        answer = text_of(session.send(question, **GREEDY), "answer" if template is CHATML else "reasoning")
        stats = session.last_stats
        if num_prompt_tokens:
            assert stats.reuse == reuse
            # All but the end of the last prompt, which its answer follows.
            assert stats.num_reused_tokens >= num_prompt_tokens - len("<>assistant\n<think>\n")
        num_prompt_tokens = stats.num_prompt_tokens
        if template is CHATML:
            assert answer == fresh_answer(session, model, tokenizer, question)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_the_cached_state_is_that_of_one_pass(family: str) -> None:
    """Against plain generate(), which has no snapshot and no second chunk."""
    model, tokenizer = chat_model(family), byte_tokenizer()
    session = ChatSession(model, tokenizer)
    for question in ("hello there", "and a second question"):
        before = list(session.messages)
        answer = text_of(session.send(question, **GREEDY))
        messages = [*before, {"role": "user", "content": question}]
        prompt = torch.tensor(
            [ids_of(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))]
        )
        expected = model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=[256, 257, 258])
        assert answer == tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True).lstrip()


def test_an_unknown_recurrent_family_is_computed_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.chat.prefix.CONTINUED_FAMILIES", CONTINUED_FAMILIES - {"qwen3_next"})
    session = ChatSession(chat_model("qwen3_next"), byte_tokenizer())
    for question in ("one", "two"):
        list(session.send(question, **GREEDY))
        assert session.last_stats.reuse == "not supported"
        assert session.last_stats.num_reused_tokens == 0


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_retry_answers_the_same_question_from_the_cache(family: str) -> None:
    session = ChatSession(chat_model(family), byte_tokenizer())
    first = text_of(session.send("hello there", **GREEDY))
    assert text_of(session.retry(**GREEDY)) == first
    assert session.last_stats.num_reused_tokens > 10
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_retry_with_a_seed_draws_anew_and_repeatably() -> None:
    session = ChatSession(chat_model(), byte_tokenizer())
    settings = {"temperature": 2.0, "top_k": 0, "max_new_tokens": 12, "seed": 5}
    draws = [text_of(session.send("hello", **settings)), text_of(session.retry(**settings))]
    session.reset()
    assert draws[0] != draws[1]
    assert draws == [text_of(session.send("hello", **settings)), text_of(session.retry(**settings))]


def test_retry_of_the_greatest_seed_draws_anew() -> None:
    session = ChatSession(chat_model(), byte_tokenizer())
    settings = {"temperature": 2.0, "top_k": 0, "max_new_tokens": 12, "seed": 2**64 - 1}
    assert text_of(session.send("hello", **settings)) != text_of(session.retry(**settings))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_prompt_reports_how_far_it_is(family: str) -> None:
    model = chat_model(family)
    session, seen = ChatSession(model, byte_tokenizer()), []
    list(session.send("hello there", **GREEDY))

    def see(*_: object) -> None:
        deadline = time.monotonic() + 10
        # The worker may be here before the consumer knows of it.
        while not session.prompt_progress[0] and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(session.prompt_progress)

    model.get_submodule("model.layers")[-1].register_forward_hook(see)
    list(session.send("x" * 60, **GREEDY))
    done, total = seen[0]
    assert total == session.last_stats.num_computed_tokens > 60
    assert 0 < done <= total
    assert seen[-1] == (total, total)
    assert session.prompt_progress == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_an_interrupted_answer_is_kept_and_the_cache_stays_right(family: str) -> None:
    model, tokenizer = chat_model(family), byte_tokenizer()
    session = ChatSession(model, tokenizer)
    list(session.send("hello there", **GREEDY))
    pieces = session.send("and now at length", temperature=0, max_new_tokens=300)
    said = next(pieces).text + next(pieces).text
    pieces.close()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert session.last_stats.finish == "interrupted"
    answer = text_of(session.send("go on", **GREEDY))
    assert session.last_stats.num_reused_tokens > 0
    assert answer == fresh_answer(session, model, tokenizer, "go on")


def test_states_count_among_a_caches_bytes() -> None:
    """Keys and values alone grow with the sequence."""
    model = chat_model("qwen3_next")
    prefix = PrefixCache(model)
    prefix.begin([5, 6, 7, 8])
    cache = prefix.cache
    assert cache is not None
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 7, 8]]), use_cache=True, **with_cache(cache))
    states = [value for layer in cache.layers for value in getattr(layer, "recurrent_states", {}).values()]
    assert states
    assert prefix.num_bytes > sum(value.nbytes for value in states)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("num_forwards", [0, 1, 2, 5])
def test_a_failed_forward_leaves_the_cache_right(family: str, num_forwards: int) -> None:
    model, tokenizer = chat_model(family), byte_tokenizer()
    session = ChatSession(model, tokenizer)
    list(session.send("hello there", **GREEDY))
    num_calls = 0

    def fail(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > num_forwards:
            raise RuntimeError("read error")

    last_layer = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="read error"):
        list(session.send("this one fails", **GREEDY))
    last_layer.remove()
    answer = text_of(session.send("once more", **GREEDY))
    assert answer == fresh_answer(session, model, tokenizer, "once more")


def test_a_message_without_an_answer_is_withdrawn_until_retry() -> None:
    model = chat_model()
    session = ChatSession(model, byte_tokenizer())

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(BudgetError, match=r"31 tokens"):
        list(session.send("hello there!", **GREEDY))
    handle.remove()
    assert session.messages == []
    list(session.retry(**GREEDY))
    assert session.messages[0] == {"role": "user", "content": "hello there!"}
    assert session.messages[1]["role"] == "assistant"


def test_an_impatient_second_interrupt_costs_only_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    session = ChatSession(model, tokenizer)
    list(session.send("hello there", **GREEDY))
    pieces = session.send("and at length", temperature=0, max_new_tokens=300)
    next(pieces)
    close, num_calls = TokenStream.close, 0

    def interrupted(stream: TokenStream) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise KeyboardInterrupt
        close(stream)

    monkeypatch.setattr(TokenStream, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pieces.close()
    answer = text_of(session.send("go on", **GREEDY))
    assert session.last_stats.num_reused_tokens == 0
    assert answer == fresh_answer(session, model, tokenizer, "go on")


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_chats_of_one_model_take_turns_step_by_step(family: str) -> None:
    model, tokenizer = chat_model(family), byte_tokenizer()
    questions = ["hello", "what is the weather like where you are, " * 2, "?"]
    alone = [text_of(ChatSession(model, tokenizer).send(question, **GREEDY)) for question in questions]
    answers = ["", "", ""]
    streams = [ChatSession(model, tokenizer).send(question, **GREEDY) for question in questions]
    for pieces in zip_longest(*streams):
        answers = [answer + (piece.text if piece else "") for answer, piece in zip(answers, pieces, strict=True)]
    assert answers == alone
    assert len(set(answers)) == 3


def test_two_answers_of_one_session_share_no_cache() -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    session = ChatSession(model, tokenizer)
    first, second = (session.send(text, **GREEDY) for text in ("one", "the other"))
    next(first)
    said = next(second).text + text_of(second)
    assert said == text_of(ChatSession(model, tokenizer).send("the other", **GREEDY))
    first.close()
    session.messages = []
    assert text_of(session.send("one more", **GREEDY)) == text_of(
        ChatSession(model, tokenizer).send("one more", **GREEDY)
    )


def test_there_is_nothing_to_retry_at_first() -> None:
    with pytest.raises(ConfigError, match="no answer to retry"):
        ChatSession(chat_model(), byte_tokenizer()).retry()


def test_reasoning_is_apart_and_kept_apart() -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    Scripted(model, [*ids_of(tokenizer, "<think>\nHm.</think>\n\nYes <think>."), END_OF_TEXT])
    session = ChatSession(model, tokenizer)
    pieces = list(session.send("?"))
    assert text_of(pieces, "reasoning") == "Hm."
    assert text_of(pieces) == "Yes <think>."
    assert session.messages[-1] == {"role": "assistant", "content": "Yes <think>.", "reasoning_content": "Hm."}
    assert session.last_stats.finish == "stop"


def test_a_whole_conversation_replaces_the_present_one() -> None:
    session = ChatSession(chat_model(), byte_tokenizer())
    list(session.send("hello", **GREEDY))
    list(session.send([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], **GREEDY))
    assert session.system == "S"
    assert [message["content"] for message in session.messages[:-1]] == ["Q"]
    with pytest.raises(ConfigError, match="message 1"):
        session.send([{"role": "robot", "content": "Q"}])
    with pytest.raises(ConfigError, match="no message"):
        session.send([])


def test_save_and_load(tmp_path: Path) -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    session = ChatSession(model, tokenizer, system="Sé breve.")
    list(session.send("hello", **GREEDY))
    session.save(tmp_path / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    other = ChatSession(model, tokenizer)
    other.load(tmp_path / "talk.json")
    assert (other.system, other.messages) == (session.system, session.messages)
    assert text_of(other.send("go on", **GREEDY)) == text_of(session.send("go on", **GREEDY))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "offload-moe chat 1", "system": 3, "messages": []}', '{"format": "other"}']
    + [
        json.dumps({"format": "offload-moe chat 1", "messages": messages})
        for messages in ("x", [{"role": "user"}], [3])
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_nothing_lost(tmp_path: Path, content: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    session = ChatSession(chat_model(), byte_tokenizer(), system="mine")
    with pytest.raises(ConfigError, match=r"talk\.json"):
        session.load(path)
    assert session.system == "mine"
    with pytest.raises(ConfigError, match="No such file"):
        session.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="No such file"):
        session.save(tmp_path / "none" / "talk.json")


def test_statistics_of_one_answer() -> None:
    counters = Counters(num_hits=5, num_misses=5)
    model, tokenizer = chat_model(), byte_tokenizer()

    def serve(*_: object) -> None:
        counters.num_hits += 3
        counters.num_misses += 1
        counters.stall_s += 0.5

    model.model.layers[0].register_forward_hook(serve)
    session = ChatSession(model, tokenizer, counters, memory=lambda: {"vram": 10})
    list(session.send("hello", temperature=0, max_new_tokens=4))
    stats = session.last_stats
    assert (stats.num_prompt_tokens, stats.num_reused_tokens, stats.reuse) == (24, 0, "nothing cached")
    assert (stats.num_decode_tokens, stats.finish, stats.memory_bytes) == (4, "length", {"vram": 10})
    assert stats.hit_rate == 0.75
    assert stats.stall_s == 2.0
    assert stats.prompt_tokens_per_s == pytest.approx(24 / stats.prompt_s)
    assert stats.decode_tokens_per_s == pytest.approx(3 / stats.decode_s)


def test_a_prompt_over_the_context_is_refused_with_the_numbers() -> None:
    session = ChatSession(chat_model(max_position_embeddings=40), byte_tokenizer())
    with pytest.raises(ConfigError, match=r"119 tokens.*context is 40"):
        list(session.send("x" * 100))
    assert session.messages == []
    list(session.send("x" * 10, temperature=0))
    assert session.last_stats.finish == "context"
    assert session.last_stats.num_prompt_tokens + session.last_stats.num_decode_tokens == 40


def test_a_model_without_a_template_says_so_and_continues_the_text() -> None:
    model, tokenizer = chat_model(), byte_tokenizer(None)
    with pytest.warns(UserWarning, match="no chat template"):
        session = ChatSession(model, tokenizer)
    answer = text_of(session.send("Once upon", **GREEDY))
    prompt = torch.tensor([ids_of(tokenizer, "Once upon")])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    list(session.send("more", **GREEDY))
    assert session.last_stats.num_reused_tokens >= len("Once upon")


def test_a_template_that_refuses_the_conversation_is_named() -> None:
    template = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + CHATML
    session = ChatSession(chat_model(), byte_tokenizer(template), system="x")
    with pytest.raises(ConfigError, match="System role not supported"):
        list(session.send("hello"))


def test_a_model_without_a_tokenizer_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatSession(chat_model(), None)


def test_pieces_are_values() -> None:
    assert Piece("answer", "a") == Piece("answer", "a")
