"""What prompt lookup guesses in known answers: tokens per pass and gain. Simulated, without a model.

    python benchmarks/guesses.py [STORE] [--row-cost 0.2] [--tokens 1000]

The tokens of each answer go through the source and the governor of the runtime; only time is calculated: a pass takes
as long as one of a plain token, and a share of that more for each guess. Only the tokenizer of the store is used.

edit, json  the prompts of `speculation.py` with the answers that are given there
others      `guess_texts.json`: tables, code, logs, configuration, quotes, tests
prose       `heldout.txt`, the first 300 tokens of which are the prompt

`us_per_token`: processor time of the source and the governor; of the beginning, per token of the prompt. The last line
of stdout is one JSON document.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness import HERE, finish
from speculation import PROMPTS, speculator_of

from offload_moe.checkpoint.tokenizer import load_tokenizer
from offload_moe.convert.jobs import LOSSLESS
from offload_moe.convert.sources import ensure_store
from offload_moe.speculate.guess import MOST_GUESSES, num_alike
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.speculator import PassCost

TEXTS, PROSE = HERE / "guess_texts.json", HERE / "heldout.txt"
PROSE_PROMPT = 300  # tokens
PLAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one answer. acceptance: by position in a pass."""

    num_tokens: int
    tokens_per_pass: float
    gain: float
    num_right: int
    num_guessed: int
    acceptance: tuple[float, ...]
    us_per_token: float
    us_per_prompt_token: float


def texts(tokenizer: Any, num_tokens: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Names, prompts and answers."""

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    given = json.loads(PROMPTS.read_text("utf-8"))
    for name in ("edit", "json"):
        text = given[name]
        yield name, ids_of(text["question"].format(text=text["text"])), ids_of(text["answer"])
    for text in json.loads(TEXTS.read_text("utf-8")):
        yield text["name"], ids_of(text["question"]), ids_of(text["answer"])
    ids = ids_of(PROSE.read_text("utf-8"))
    yield "prose", ids[:PROSE_PROMPT], ids[PROSE_PROMPT : PROSE_PROMPT + num_tokens]


def replay(prompt: list[int], answer: list[int], row_cost: float) -> Outcome:
    speculator = speculator_of(NgramSource(), is_governed=True)
    began = time.process_time()
    speculator.begin(prompt)
    prompt_s, began = time.process_time() - began, time.process_time()
    spent, num_passes, done = 0.0, 0, 0
    while done < len(answer):
        guesses = speculator.guess(min(MOST_GUESSES, len(answer) - done - 1))
        num_right = num_alike([*guesses], answer[done:])
        cost = 1 + row_cost * len(guesses)
        if guesses:
            speculator.note_pass(PassCost(1 + len(guesses), cost * PLAIN_S), len(guesses), num_right)
        else:
            speculator.note_plain(PassCost(1, PLAIN_S))
        for token in answer[done : done + 1 + num_right]:
            speculator.take(token)
        spent, num_passes, done = spent + cost, num_passes + 1, done + 1 + num_right
    tally = speculator.tally
    return Outcome(
        num_tokens=len(answer),
        tokens_per_pass=len(answer) / num_passes,
        gain=len(answer) / spent,
        num_right=tally.num_right,
        num_guessed=tally.num_guessed,
        acceptance=tally.acceptance,
        us_per_token=(time.process_time() - began) / len(answer) * 1e6,
        us_per_prompt_token=prompt_s / max(len(prompt), 1) * 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--row-cost", type=float, default=0.2, help="of each guess, as a share of a plain pass")
    parser.add_argument("--tokens", type=int, default=1000, help="of the prose, at most")
    options = parser.parse_args()
    path = ensure_store(options.store, codec=None, dense_codec=LOSSLESS, revision=None, token=None)
    tokenizer, reason = load_tokenizer(path)
    if tokenizer is None:
        parser.error(reason)
    found: dict[str, Outcome] = {}
    for name, prompt, answer in texts(tokenizer, options.tokens):
        found[name] = each = replay(prompt, answer, options.row_cost)
        print(
            f"{name:<18} {each.num_tokens:>5,} tokens, {each.tokens_per_pass:.2f} a pass, gain {each.gain:.2f}, "
            f"{each.num_right} of {each.num_guessed} right, {each.us_per_token:.0f} us a token"
        )
    finish(
        {
            "benchmark": "guesses",
            "label": "simulated",
            "store": options.store,
            "row_cost": options.row_cost,
            "texts": {name: asdict(each) for name, each in found.items()},
        }
    )


if __name__ == "__main__":
    main()
