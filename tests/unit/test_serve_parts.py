"""Small parts of the server: scores, stop strings, schemas, JSON, errors, hosts."""

import json
from typing import Any, cast

import pytest
import torch

from offload_moe.errors import BudgetError, ConfigError
from offload_moe.serve.check import MOST_DEPTH, check, parse_json
from offload_moe.serve.errors import ApiError, PromptTooLong, api_error
from offload_moe.serve.guide import Guides
from offload_moe.serve.schemas import array, either, integer, number, optional, record, string
from offload_moe.serve.scoring import Bias, LogprobRecorder, Penalties
from offload_moe.serve.security import host_name, is_address
from offload_moe.serve.stops import StopStrings


def test_penalties_count_the_answers_own_tokens() -> None:
    ids, scores = torch.tensor([[3, 3, 0, 1, 1]]), torch.zeros(1, 4)
    penalized = Penalties(2, frequency=0.5, presence=2.0)(ids, scores)
    assert penalized.tolist() == [[-2.5, -3.0, 0.0, 0.0]]


def test_a_bias_is_added() -> None:
    assert Bias({1: 2.0, 3: -100.0})(torch.empty(1, 0), torch.ones(1, 4)).tolist() == [[1.0, 3.0, 1.0, -99.0]]


def test_logprobs_are_of_the_logits_before_any_change() -> None:
    recorder = LogprobRecorder(2)
    recorder.observe(torch.tensor([[0.0, 1.0, 2.0]]))
    value, top = recorder.of(0)
    assert value == pytest.approx(-2.4076, abs=1e-4)
    assert [token for token, _ in top] == [2, 1]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "found"),
    [
        (["END"], ["a", "b"], "ab", None),
        (["END"], ["aE", "N", "Db"], "a", "END"),
        (["END"], ["aE", "N", "x"], "aENx", None),
        (["END"], ["EEN", "DD"], "E", "END"),
        (["ab", "abc"], ["xabc"], "x", "abc"),
        (["b", "ab"], ["xab"], "x", "ab"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        ([""], ["a"], "a", None),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], expected: str, found: str | None) -> None:
    strings = StopStrings(stops)
    text = "".join(strings.push(piece) for piece in pieces)
    assert (text + strings.flush(), strings.found) == (expected, found)


def test_structured_output_needs_a_tokenizer_of_the_rust_library() -> None:
    class PythonTokenizer:
        """Any other one."""

    with pytest.raises(ApiError, match="needs a fast tokenizer, and this model has a PythonTokenizer") as caught:
        Guides(cast(Any, PythonTokenizer()), {1}, 10)
    assert caught.value.status == 400


SCHEMA = record(
    {
        "n": optional(integer(1, 3)),
        "x": number(0),
        "mode": string("a", "b"),
        "list": array(record({"k": string(longest=2)}, "k"), most=2),
        "any": either(string(), array(integer())),
        "map": {"type": "object", "additionalProperties": number(-1, 1)},
    },
    "mode",
)


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({}, "mode"),
        ({"mode": "c"}, "mode"),
        ({"mode": "a", "n": 4}, "n"),
        ({"mode": "a", "n": 1.5}, "n"),
        ({"mode": "a", "n": True}, "n"),
        ({"mode": "a", "x": -0.1}, "x"),
        ({"mode": "a", "list": [{}, {"k": "ab"}]}, "list[0].k"),
        ({"mode": "a", "list": [{"k": "ab"}, {"k": "abc"}]}, "list[1].k"),
        ({"mode": "a", "list": [{"k": "a"}] * 3}, "list"),
        ({"mode": "a", "any": 3}, "any"),
        ({"mode": "a", "any": ["x"]}, "any[0]"),
        ({"mode": "a", "map": {"k": 2}}, "map.k"),
    ],
)
def test_what_a_schema_refuses_is_named(document: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        check(document, SCHEMA)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


def test_what_a_schema_takes() -> None:
    check({"mode": "b", "n": None, "x": 2, "list": [], "any": [1], "map": {"k": 0.5}, "other": 1}, SCHEMA)
    check({"mode": "b", "n": 2.0, "any": "text"}, SCHEMA)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def test_the_depth_of_json_is_limited() -> None:
    assert parse_json(nested(MOST_DEPTH))
    with pytest.raises(ApiError, match="levels deep"):
        parse_json(nested(MOST_DEPTH + 1))
    brackets = json.dumps({"text": "[{" * 1000, "quote": 'a\\"[' * 100}).encode()
    assert parse_json(brackets)["text"] == "[{" * 1000


def test_errors_of_the_product_keep_their_words() -> None:
    assert api_error(ConfigError("words")).document("openai")["error"]["message"] == "words"
    assert api_error(BudgetError("full")).code == "context_length_exceeded"
    hidden = api_error(ZeroDivisionError("secret"))
    assert hidden.status == 500
    assert "secret" not in hidden.message


def test_a_long_prompt_in_each_apis_words() -> None:
    error = PromptTooLong(9000, 8192)
    assert error.document("anthropic")["error"]["message"] == "prompt is too long: 9000 tokens > 8192 maximum"
    assert "maximum context length is 8192 tokens" in error.document("openai")["error"]["message"]


def test_host_names() -> None:
    hosts = ["localhost:80", "[::1]:80", "::1", "EXAMPLE.com", "10.0.0.1:1"]
    assert [host_name(host) for host in hosts] == ["localhost", "::1", "::1", "example.com", "10.0.0.1"]
    assert [is_address(name) for name in ("10.0.0.1", "::1", "10.0.0.1.example", "")] == [True, True, False, False]
