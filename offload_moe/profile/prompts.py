"""The prompts of a profile: eight built-in ones in groups, or a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from offload_moe.errors import ConfigError
from offload_moe.system.texts import read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedPrompt:
    group: str
    text: str


BUILT_IN = tuple(
    GroupedPrompt(group=group, text=text)
    for group, text in (
        ("prose", "Describe a small harbour town on a rainy morning, and the people who are up before sunrise."),
        ("prose", "Why did people in the Middle Ages build cathedrals that took longer than a lifetime to finish?"),
        ("code", "Write a Python function that merges two sorted lists into one sorted list, without using sort()."),
        ("code", "def parse_header(line: str) -> tuple[str, str]:\n    # Split 'Name: value' and strip both parts.\n"),
        ("numbers", "List the first fifteen multiples of 17 and their sum: 17, 34, 51, 68, 85, 102, 119, 136,"),
        (
            "numbers",
            "A train covers 348 km in 2.9 hours and 512 km in 4.1 hours. Compute both speeds and compare them.",
        ),
        (
            "other language",
            "Explique en français comment une abeille trouve le chemin de sa ruche, en quelques phrases.",
        ),
        ("other language", "Beschreibe auf Deutsch, wie man ein gutes Brot backt und warum der Teig ruhen muss."),
    )
)


def read_prompts(path: str | Path) -> list[GroupedPrompt]:
    """One prompt per line; a line that is a JSON object has the prompt as `prompt` and may have a `group`.

    Raises: ConfigError when the file cannot be read, has no prompt, or has an object without one.
    """
    lines = read_text(Path(path)).splitlines()
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"Prompts {path} is empty. Write one prompt per line.")
    return prompts


def _prompt(line: str, where: str) -> GroupedPrompt:
    if not line.lstrip().startswith("{"):
        return GroupedPrompt(group="", text=line.strip())
    try:
        entry = json.loads(line)
    except ValueError:
        return GroupedPrompt(group="", text=line.strip())  # a prompt that begins with a brace
    text = entry.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f'{where} has no "prompt". Write {{"prompt": "...", "group": "..."}} or plain text.')
    return GroupedPrompt(group=str(entry.get("group", "")), text=text)
