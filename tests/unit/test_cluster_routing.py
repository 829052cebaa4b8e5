"""Where a request goes: chains of beginnings, who has the longest one, streams held back, slots of nodes."""

import json
from collections import Counter
from typing import Any

import pytest

from offload_moe.cluster.chains import BLOCK, MOST_LINKS, NO_CHAIN, Chain, chain_of, chain_of_pieces
from offload_moe.cluster.opening import WAITING, Opening
from offload_moe.cluster.router import ANSWER, Router
from offload_moe.cluster.slots import slots_of

CHAT = "/v1/chat/completions"


def chain(path: str = CHAT, ignore_prefix: str | None = None, **document: Any) -> Chain:
    return chain_of(path, json.dumps(document).encode(), ignore_prefix)


def shared(first: Chain, second: Chain) -> int:
    """Characters that both begin with."""
    length = 0
    for one, other, end in zip(first.keys, second.keys, first.lengths, strict=False):
        if one != other:
            break
        length = end
    return length


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_conversation_goes_on_from_its_earlier_turns() -> None:
    first = chain(messages=[user("a" * 700)])
    second = chain(messages=[user("a" * 700), said("b"), user("c")])
    assert (first.lengths, second.lengths) == ([512, 700], [512, 700, 701, 702])
    assert shared(first, second) == 700
    assert shared(first, chain(messages=[user("a" * 600)])) == BLOCK
    assert shared(first, chain(messages=[said("a" * 700)])) == 0
    assert shared(first, chain(messages=[user("a" * 700)], tools=[{"name": "x"}])) == 0


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("/v1/completions", {"prompt": "a" * 600}, {"prompt": "a" * 600 + "b"}),
        (
            "/v1/messages",
            {"system": "s" * 600, "messages": [user("a")]},
            {"system": "s" * 600, "messages": [user("b")]},
        ),
        ("/v1/responses", {"instructions": "s" * 600, "input": "a"}, {"instructions": "s" * 600, "input": [user("a")]}),
    ],
)
def test_every_api_has_a_beginning(path: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert shared(chain(path, **first), chain(path, **second)) >= BLOCK


def test_parts_of_text_are_their_text_wherever_a_client_marks_them() -> None:
    marked = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "42"}
    first = chain("/v1/messages", messages=[user([marked]), user([result | {"cache_control": {}}])])
    second = chain("/v1/messages", messages=[user("hello"), user([result]), user("more")])
    assert shared(first, second) == first.length


def test_what_the_servers_ignore_is_ignored() -> None:
    chains = [
        chain("/v1/messages", "x-header: [^\n]*\n", system=f"x-header: {number}\nBe brief.", messages=[], tools=[1])
        for number in range(2)
    ]
    assert shared(*chains) == chains[0].length
    chats = [chain(CHAT, "[0-9]", tools=[1], messages=[user(f"{number} a")]) for number in range(2)]
    assert shared(*chats) == chats[0].length


@pytest.mark.parametrize("body", [b"{", b"[]", b"1", b'{"messages": 3}', b'{"messages": [3, null]}', b"[" * 100_000])
def test_a_body_of_another_form_is_left_to_the_replica(body: bytes) -> None:
    chain_of(CHAT, body)
    assert chain_of("/tokenize", b'{"content": "a"}') == NO_CHAIN


def test_a_chain_is_bounded() -> None:
    assert len(chain_of_pieces([("user", "a" * BLOCK * (MOST_LINKS + 5))]).keys) == MOST_LINKS


def router(*names: str, **settings: int) -> Router:
    made = Router(**settings)
    for name in names:
        made.add(name)
    return made


def answered(router: Router, chain: Chain, without: tuple[str, ...] = ()) -> str:
    """The replica that a request went to, which has ended there."""
    ticket = router.take(chain, without)
    assert ticket is not None
    router.give_back(ticket)
    return ticket.name


def test_a_conversation_comes_back_and_others_are_spread() -> None:
    routes = router("a", "b")
    chains = [chain(messages=[user(text * 300)]) for text in "stuv"]
    assert [answered(routes, each) for each in chains] == ["a", "b", "a", "b"]
    longer = [chain(messages=[user(text * 300), said("x"), user("y")]) for text in "vuts"]
    assert [answered(routes, each) for each in longer] == ["b", "a", "b", "a"]


def test_the_longest_beginning_counts() -> None:
    routes = router("a", "b")
    system = {"role": "system", "content": "s" * 1000}
    first, second = ([system, user(text * 2000)] for text in "tu")
    assert answered(routes, chain(messages=first), without=("b",)) == "a"
    assert answered(routes, chain(messages=second), without=("a",)) == "b"
    assert answered(routes, chain(messages=[*first, said("x")])) == "a"
    assert answered(routes, chain(messages=[*second, said("x")])) == "b"


def test_conversations_that_share_a_system_prompt_are_spread() -> None:
    routes = router("a", "b", "c")
    system = {"role": "system", "content": "s" * 20_000}
    begun = [[system, user(text)] for text in "tuvwxy"]
    went = [answered(routes, chain(messages=messages)) for messages in begun]
    assert went[:2] == ["a", "a"]  # as an edited first message would
    assert Counter(went[2:]) == {"b": 2, "c": 1, "a": 1}
    again = [answered(routes, chain(messages=[*messages, said("x"), user("y")])) for messages in begun[::-1]]
    assert again == went[::-1]
    assert [answered(routes, chain(messages=messages)) for messages in begun] == went


def test_a_replica_with_more_to_do_than_a_beginning_saves_is_passed_over() -> None:
    routes = router("a", "b")
    short = chain(messages=[user("a" * 600)])
    long = chain(messages=[user("b" * 4 * ANSWER)])
    first = [routes.take(each, ("b",)) for each in (short, long)]
    assert all(first)
    assert routes.num_running("a") == 2
    assert answered(routes, short) == "b"
    for ticket in first:
        assert ticket is not None
        routes.give_back(ticket)
    busy = routes.take(chain(messages=[user("c")]), ("b",))
    assert busy is not None  # one answer's work is less than the long beginning
    assert answered(routes, long) == "a"


def test_a_lost_replica_is_forgotten_with_what_it_had() -> None:
    routes = router("a", "b")
    each = chain(messages=[user("a" * 600)])
    ticket = routes.take(each)
    assert ticket is not None
    assert ticket.name == "a"
    routes.remove("a")
    routes.give_back(ticket)
    assert answered(routes, each) == "b"
    assert routes.take(each, ("b",)) is None
    routes.add("a-2")
    assert answered(routes, each) == "b"
    assert routes.names == ["b", "a-2"]


def test_beginnings_are_bounded_and_the_end_of_a_conversation_goes_first() -> None:
    routes = router("a", most_kept=3)
    ticket = routes.take(chain(messages=[user(text) for text in "abcde"]))
    assert ticket is not None
    again = routes.take(chain(messages=[user(text) for text in "abcde"]))
    assert again is not None
    assert (ticket.num_known, again.num_known) == (0, 3)


START = b'event: message_start\ndata: {"type":"message_start"}\n\n'
TOKEN = b'event: content_block_start\ndata: {"x":1}\n\n'
PROGRESS = b'data: {"id":"1","choices":[],"usage":null,"prompt_progress":{"total":3}}\n\n'
CHUNK = b'data: {"id":"1","choices":[{"delta":{"content":"\\"choices\\":[],\\"prompt_progress\\":"}}]}\n\n'


def test_a_stream_is_held_back_until_its_first_token() -> None:
    opening = Opening()
    assert opening.pass_on(b": wait") == b""
    assert opening.pass_on(b"ing\n\n" + START) == WAITING + WAITING
    assert opening.pass_on(b"event: ping\ndata: {}\n\n") == b"event: ping\ndata: {}\n\n"
    assert not opening.has_token
    assert opening.pass_on(TOKEN + b"data: half") == START + TOKEN
    assert opening.has_token
    assert opening.pass_on(b" and whole\n\ndata: ") == b"data: half and whole\n\n"


def test_the_progress_of_a_prompt_is_no_token() -> None:
    opening = Opening()
    assert opening.pass_on(PROGRESS) == PROGRESS
    assert not opening.has_token
    assert opening.pass_on(CHUNK + START) == CHUNK + START
    assert opening.has_token


def test_one_replica_for_a_node_or_for_each_gpu() -> None:
    nodes = [
        {"Alive": True, "NodeID": "n1", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 16.0, "GPU": 2.0}},
        {"Alive": True, "NodeID": "n2", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 8.0}},
        {"Alive": True, "NodeID": "head", "NodeManagerAddress": "10.0.0.3", "Resources": {"memory": 1.0}},
        {"Alive": False, "NodeID": "gone", "NodeManagerAddress": "10.0.0.4", "Resources": {}},
    ]
    places = [(slot.node, slot.number, slot.num_cpus, slot.num_gpus) for slot in slots_of(nodes)]
    assert places == [("n1", 0, 8, 1), ("n1", 1, 8, 1), ("n2", 0, 8, 0)]
    assert [slot.num_gpus for slot in slots_of(nodes, uses_gpus=False)] == [0, 0]
    assert [slot.num_cpus for slot in slots_of(nodes, has_ram_limit=False)] == [16, 8]
