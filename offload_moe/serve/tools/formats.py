"""How each family writes a call: one row of a table per format.

A call is `opening`, then one or more of (`header`, arguments, `end`), separated by `more`, then `closing`. Patterns are
matched where the text stands, and partially while it streams.
"""

from dataclasses import dataclass
from typing import Literal

NAME = r"(?P<name>[\w.\-/]+)"
JSON_HEADER = r'\s*\{\s*"name"\s*:\s*"' + NAME + r'"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
OBJECT = r"\{"
NOTHING = r"(?!)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """One format. openings: texts that begin a call. marks: texts in a chat template by which it is known.

    follows: what must stand behind a header, for it to be one.
    arguments: "json" is one object; "python" are keyword arguments up to a closing bracket; else a pattern of one
    parameter, with groups `key` and `value`. special: special tokens that belong to the format's text.
    forced: what to write before and behind the arguments when a call is forced; NAME stands for the name. parameter:
    likewise around one parameter's value, with KEY.
    """

    name: str
    marks: tuple[str, ...]
    openings: tuple[str, ...]
    header: str
    follows: str = ""
    arguments: str | Literal["json", "python"] = "json"
    end: str = r"\s*"
    more: str = NOTHING
    closing: str = NOTHING
    special: tuple[str, ...] = ()
    forced: tuple[str, str]
    parameter: tuple[str, str] = ("", "")


HERMES = CallFormat(
    name="hermes",
    marks=("<tool_call>",),
    openings=("<tool_call>",),
    header=JSON_HEADER,
    follows=OBJECT,
    end=r"\s*\}?\s*(?=</tool_call>)",
    closing=r"\s*</tool_call>",
    special=("<tool_call>", "</tool_call>"),
    forced=('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
)
MISTRAL = CallFormat(  # Mixtral 8x7B and 8x22B, Mistral 3
    name="mistral",
    marks=("[TOOL_CALLS]",),
    openings=("[TOOL_CALLS]",),
    header=r"\s*\[?" + JSON_HEADER,
    follows=OBJECT,
    end=r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}',
    more=r"\s*,\s*(?=\{)",
    closing=r"\s*\]",
    special=("[TOOL_CALLS]",),
    forced=('[TOOL_CALLS] [{"name": "NAME", "arguments": ', "}]"),
)
MISTRAL_NAMED = CallFormat(  # since Mistral Small 3.2
    name="mistral with names",
    marks=("[ARGS]",),
    openings=("[TOOL_CALLS]",),
    header=r"\s*" + NAME + r"(?:\[CALL_ID\]\w+)?\[ARGS\]\s*",
    follows=OBJECT,
    special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    forced=("[TOOL_CALLS]NAME[ARGS]", ""),
)
DEEPSEEK_V3 = CallFormat(  # V3 and R1
    name="deepseek v3",
    marks=("<｜tool▁sep｜>",),
    openings=("<｜tool▁calls▁begin｜>",),
    header=r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?" + NAME + r"(?:<｜tool▁sep｜>|\s*```json)\s*",
    follows=OBJECT,
    end=r"\s*(?:```)?\s*<｜tool▁call▁end｜>",
    more=r"\s*(?=<｜tool▁call▁begin｜>)",
    closing=r"\s*<｜tool▁calls▁end｜>",
    special=(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    forced=(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
)
KIMI_K2 = CallFormat(
    name="kimi k2",
    marks=("<|tool_calls_section_begin|>",),
    openings=("<|tool_calls_section_begin|>",),
    header=r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?"
    + r"(?P<name>[\w.\-/]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*",
    follows=OBJECT,
    end=r"\s*<\|tool_call_end\|>",
    more=r"\s*(?=<\|tool_call_begin\|>)",
    closing=r"\s*<\|tool_calls_section_end\|>",
    special=(
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    forced=(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
)
QWEN3_CODER = CallFormat(  # Qwen3-Coder, Qwen3-Next and later, Nemotron 3
    name="qwen3 coder",
    marks=("<function=",),
    openings=("<tool_call>", "<function="),
    header=r"\s*(?:<function=)?" + NAME + r">",
    arguments=r"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
    forced=("<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>"),
    parameter=("<parameter=KEY>\n", "\n</parameter>\n"),
    end=r"\s*</function>",
    closing=r"\s*</tool_call>",
    special=("<tool_call>", "</tool_call>"),
)
GLM = CallFormat(  # GLM-4.5 and later
    name="glm",
    marks=("<arg_key>",),
    openings=("<tool_call>",),
    header=r"\s*" + NAME + r"\s*",
    follows="<arg_key>|</tool_call>",
    arguments=r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
    forced=("<tool_call>NAME\n", "</tool_call>"),
    parameter=("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
    end=r"\s*</tool_call>",
    special=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
MINIMAX = CallFormat(  # M2
    name="minimax",
    marks=("<minimax:tool_call>",),
    openings=("<minimax:tool_call>",),
    header=r'\s*<invoke name="?' + NAME + r'"?>',
    arguments=r'\s*<parameter name="?(?P<key>[^">]+)"?>(?P<value>.*?)</parameter>',
    forced=('<minimax:tool_call>\n<invoke name="NAME">\n', "</invoke>\n</minimax:tool_call>"),
    parameter=('<parameter name="KEY">', "</parameter>\n"),
    end=r"\s*</invoke>",
    more=r"\s*(?=<invoke )",
    closing=r"\s*</minimax:tool_call>",
    special=("<minimax:tool_call>", "</minimax:tool_call>"),
)
LLAMA4 = CallFormat(
    name="llama 4",
    marks=("<|python_start|>", "[func_name1("),
    openings=("<|python_start|>[", "["),
    header=r"\s*" + NAME + r"\(",
    arguments="python",
    forced=("[NAME(", ")]"),
    parameter=("KEY=", ", "),
    more=r"\s*,\s*(?=\w)",
    closing=r"\s*\]",
    special=("<|python_start|>",),
)
HARMONY = CallFormat(  # read by its splitter, see `harmony.py`
    name="harmony",
    marks=("<|channel|>",),
    openings=(),
    header=NOTHING,
    forced=("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "<|call|>"),
)

# Marks are looked for in this order: several formats share `<tool_call>`.
FORMATS = (
    HARMONY,
    MINIMAX,
    KIMI_K2,
    DEEPSEEK_V3,
    MISTRAL_NAMED,
    MISTRAL,
    GLM,
    QWEN3_CODER,
    LLAMA4,
    HERMES,
)


def knows_tools(template: str | None) -> bool:
    return template is not None and "tools" in template


def format_of(template: str) -> CallFormat | None:
    """The format whose marks a chat template has."""
    return next((each for each in FORMATS if any(mark in template for mark in each.marks)), None)
