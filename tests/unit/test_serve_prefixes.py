"""Which kept cache a request takes, and which goes first."""

from collections.abc import Sequence

import pytest
import torch

from offload_moe.chat.prefix import PrefixCache
from offload_moe.families.cache_name import with_cache
from offload_moe.serve.prefixes import Prefixes
from tests.support.chat import chat_model


class Desk:
    """Requests that end at once: what they share with a kept cache, by its number of tokens."""

    def __init__(
        self, most: int = 4, budget_tokens: int | None = None, family: str = "llama", can_park: bool = False
    ) -> None:
        self.model, self.made = chat_model(family), list[PrefixCache]()
        self.prefixes = Prefixes(
            lambda: PrefixCache(self.model),
            most=most,
            budget_tokens=budget_tokens,
            can_park=lambda num_bytes: can_park and num_bytes > 0,
        )

    def ask(self, ids: Sequence[int]) -> int:
        prefix = self.prefixes.lend(ids)
        num_reused, _ = prefix.begin(ids)
        with torch.inference_mode():
            out = self.model(torch.tensor([ids[num_reused:]]), **with_cache(prefix.cache))
        self.logits = out.logits[0, -1]
        self.made += [prefix] if prefix not in self.made else []
        prefix.commit(prefix.cache, ids, is_whole=True)
        self.prefixes.give_back(prefix)
        return num_reused


def conversation(first: int, length: int) -> list[int]:
    return [(first * 31 + index * 7) % 250 for index in range(length)]


def test_conversations_alternate_without_computing_anything_twice() -> None:
    desk = Desk()
    chats = [conversation(first, 40) for first in range(3)]
    assert [desk.ask(chat) for chat in chats] == [0, 0, 0]
    for _ in range(2):
        chats = [[*chat, 5, 6, 7] for chat in chats]
        assert [desk.ask(chat) for chat in chats] == [len(chat) - 3 for chat in chats]
    assert desk.prefixes.num_kept == 3


def test_requests_on_the_side_push_each_other_out_but_no_conversation() -> None:
    desk = Desk(most=3)
    chat = conversation(1, 60)
    desk.ask(chat)
    assert desk.ask([*chat, 1]) == 60
    for side in range(10, 16):
        assert desk.ask(conversation(side, 30)) == 0
    assert desk.ask([*chat, 1, 2]) == 61


def test_a_request_that_leaves_early_gets_a_copy() -> None:
    desk = Desk()
    chat = conversation(1, 100)
    desk.ask(chat)
    assert desk.ask([*chat[:40], 251, 252]) == 40
    assert desk.ask([*chat, 9]) == 100
    assert desk.prefixes.num_kept == 2


def test_a_small_difference_takes_the_cache_over() -> None:
    desk = Desk()
    chat = conversation(1, 100)
    desk.ask(chat)
    assert desk.ask([*chat[:90], 251, 252]) == 90
    assert desk.ask([*chat, 9]) == 90
    assert desk.prefixes.num_kept == 1


def test_the_budget_counts_tokens() -> None:
    desk = Desk(most=8, budget_tokens=120)
    for first in range(5):
        desk.ask(conversation(first, 50))
        assert desk.prefixes.num_tokens <= 120
    assert desk.prefixes.num_kept == 2
    assert desk.ask([*conversation(4, 50), 1]) == 50
    assert desk.ask([*conversation(0, 50), 1]) == 0


def test_a_cache_in_use_is_never_shared() -> None:
    desk = Desk()
    chat = conversation(1, 50)
    desk.ask(chat)
    first, second = desk.prefixes.lend([*chat, 1]), desk.prefixes.lend([*chat, 2])
    assert first is not second
    assert (first.num_usable([*chat, 1]), second.num_usable([*chat, 2])) == (50, 0)


def test_none_are_kept_where_none_may_be() -> None:
    desk = Desk(most=0)
    chat = conversation(1, 50)
    assert [desk.ask(chat), desk.ask([*chat, 1])] == [0, 0]
    assert desk.prefixes.num_kept == 0


def test_windows_continue_from_the_end_only() -> None:
    desk = Desk(family="gpt_oss")
    chat = conversation(1, 60)
    desk.ask(chat)
    assert desk.ask([*chat, 1, 2]) == 60
    assert desk.ask([*chat[:50], 251]) == 0


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_caches_over_the_budget_are_parked_and_come_back_whole(family: str) -> None:
    """On the CPU a move is a copy; the logits behind it are the same."""
    desk, plain = Desk(budget_tokens=60, family=family, can_park=True), Desk(family=family)
    chats = [conversation(first, 50) for first in range(3)]
    for _ in range(3):
        for number, chat in enumerate(chats):
            assert desk.ask(chat) == plain.ask(chat)
            assert torch.equal(desk.logits, plain.logits)
            assert desk.prefixes.num_tokens <= 60
            chats[number] = [*chat, 5, 6, 7]
    assert desk.prefixes.num_kept == 3
    assert sum(prefix.is_parked for prefix in desk.made) == 2


def test_a_copy_of_a_parked_cache_computes_at_once() -> None:
    desk = Desk(budget_tokens=110, can_park=True)
    chat = conversation(1, 100)
    desk.ask(chat)
    desk.ask(conversation(2, 60))
    assert [prefix.is_parked for prefix in desk.made] == [True, False]
    assert desk.ask([*chat[:40], 251, 252]) == 40
