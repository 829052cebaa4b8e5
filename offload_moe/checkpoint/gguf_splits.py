"""How texts are split before their bytes are merged, where transformers' GGUF integration has no rule of that name.

Source: llama.cpp, src/llama-vocab.cpp, whose tokens test_gguf_llamacpp.py compares; its expressions are those of the
models' own `tokenizer.json` (DeepSeek-V2 and V3, Granite 3, GLM-4.5, HunYuan-A13B, Kimi K2, K-EXAONE), and for Trinity
those of llama.cpp, which counts the digits of a number from its end.
"""

from collections.abc import Mapping

# Names of one rule. llama.cpp splits with the second name's expressions for each.
SAME: Mapping[str, str] = {"glm4": "llama-bpe", "chatglm-bpe": "llama-bpe", "hunyuan": "qwen2", "solar-open": "qwen2"}

_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # as the models have it
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]"
_OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BEFORE, _ENDINGS = r"[^\r\n\p{L}\p{N}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_OF_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_CODE = (r"\p{N}", _OF_GPT2)

# Expressions that split one after the other: what one has taken, and what is left between, is split by the next.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "deepseek-llm": (r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_MARKS}+", r"\s+$", _IDEOGRAPHS, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _WORDS,
    ),
    "afmoe": (r"\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3}", _OF_SCRIPTS, _WORDS),
    "exaone-moe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "kimi-k2": (
        r"[\p{Han}]+"
        f"|{_BEFORE}?{_UPPER}*{_LOWER}+{_ENDINGS}|{_BEFORE}?{_UPPER}+{_LOWER}*{_ENDINGS}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "refact": _CODE,
    "starcoder": _CODE,
}
