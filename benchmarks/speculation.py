"""What guessed tokens gain: the edit of a text and the extraction of JSON, in memory and from disk; prose; a replay.

    python benchmarks/speculation.py [STORE] [--threads 2] [--trials 5] [--resident .4] [--replay-alone | --prose-alone]

Each figure alternates with plain decoding, and answers are the same with guesses and without, which is checked.

edit, json      `speculate="ngram"` over "off". The answers are given: the right ones, which a model as small as the
                demo does not find. They are computed like any other, only the choice is made for the model.
                `own_edit`, `own_json`: the model's own, greedy. `_disk`: with so many of the experts in RAM, the rest
                read from disk
prose           "auto" over "off", greedy, the median of each of 20 prompts; the least is `auto_prose_worst_ratio`
replay          the given edit with its own tokens as guesses, of which a draw makes one in five wrong, 2 to 8 rows.
                `share_of_bound`: the gain over the gain that the bytes read allow, dense weights once per pass and each
                expert that its rows chose; `replay_share_of_bound` has the least, median and greatest of all numbers of
                rows. `governed`: by the governor, which may take fewer; `replay_auto_worst_ratio` is the least of these

`--replay-alone`, for a store whose tokenizer has no vocabulary: the replay in memory, of tokens without a meaning.
`--prose-alone`: its worst prompt is one of many ratios near 1, so it takes more trials than the others.

With one thread the time is that of the processor where no expert is on disk, else the clock's. The last line of stdout
is one JSON document.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import alternate, bind_to_cores, finish, paired_ratio, prompt_ids, spread
from run_store import fill

PROMPTS = Path(__file__).parent / "speculation_prompts.json"
ACCEPTANCE = 0.8
OWN_TOKENS = 160  # of an answer that is not given
DRAWN_PROMPT = 64
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one answer: tokens per second behind the first, passes and distinct experts of a layer in each."""

    rate: float
    num_passes: int
    experts_per_pass: float


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and the answer that is given; empty for the model's own."""

    ids: list[int]
    answer: list[int]


def choose(task: Task, input_ids: Any, scores: Any) -> Any:
    """A logits processor: the next token of the answer."""
    token = task.answer[input_ids.shape[1] - len(task.ids)]
    chosen = scores.new_full(scores.shape, float("-inf"))
    chosen[:, token] = 0.0
    return chosen


class Answers:
    """Greedy answers of one loaded model."""

    def __init__(self, model: Any, num_tokens: int, clock: Clock) -> None:
        from offload_moe.chat.template import PromptFormat

        tokenizer = model.tokenizer
        self.model, self._num_tokens, self._clock = model, num_tokens, clock
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        self._format = None if tokenizer is None else PromptFormat(model.hf, tokenizer, raw=not has_template)

    def task(self, question: str, answer: str = "") -> Task:
        """answer: what the model will choose; empty for its own choice."""
        assert self._format is not None
        ids = self._format.encode(self._format.render([{"role": "user", "content": question}]))
        return Task(ids, self._format.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else [])

    def drawn_task(self) -> Task:
        """Of tokens that mean nothing."""
        size = self.model.hf.config.get_text_config(decoder=True).vocab_size
        ids = [token % size for token in prompt_ids(0, DRAWN_PROMPT + self._num_tokens)]
        return Task(ids[:DRAWN_PROMPT], ids[DRAWN_PROMPT:])

    def run(self, task: Task, expected: list[int], speculator: Any = None) -> Figures:
        """One answer; its tokens are appended to `expected`, or compared with what is there."""
        import torch

        from offload_moe.chat.sampling import Sampling
        from offload_moe.chat.steering import Steering
        from offload_moe.chat.stream import TokenStream

        hf, stats = self.model.hf, self.model.stats
        greedy = Sampling(temperature=0)
        most = min(self._num_tokens, len(task.answer) or OWN_TOKENS)
        stop_ids = () if self._format is None else self._format.stop_ids
        config = greedy.generation_config(hf, stop_ids=stop_ids, max_new_tokens=most)
        steering = Steering(processors=[partial(choose, task)] if task.answer else [])
        with TokenStream(hf, torch.tensor([task.ids]), config, steering=steering, speculator=speculator) as stream:
            next(stream)
            before, began = stats.copy(), self._clock()
            for _ in stream:
                pass
            elapsed, seen = self._clock() - began, stats.since(before)
        expected += [] if expected else stream.tokens
        assert stream.tokens == expected, "guesses have changed an answer"
        num_passes = seen.num_acquires // len(self.model.layers)
        return Figures((len(expected) - 1) / elapsed, num_passes, seen.num_accesses / seen.num_acquires)

    def guesses(self, choice: str) -> Any:
        """Those of a new conversation."""
        from offload_moe.speculate.speculation import speculation_of

        return speculation_of(self.model.hf).conversation(choice)


class Replay:
    """An answer that is known, guessed with a drawn acceptance; of each pass as many as given."""

    certainties = (1.0,)
    is_free = True

    def __init__(self, answer: Sequence[int], num_guesses: int) -> None:
        self._answer, self._number = answer, num_guesses
        self._at, self._random = 0, random.Random(0)

    def begin(self, ids: Sequence[int]) -> None:
        self._at, self._random = 0, random.Random(0)

    def take(self, token: int) -> None:
        self._at += 1

    def guess(self, most: int) -> Any:
        from offload_moe.speculate.guess import Guess

        known = self._answer[self._at :][: min(most, self._number)]
        return Guess(tuple(token if self._random.random() < ACCEPTANCE else token ^ 1 for token in known))


class Bound:
    """The bytes that a pass must read."""

    def __init__(self, model: Any) -> None:
        embedding = model.hf.get_input_embeddings()
        tables = sum(value.nbytes for value in (*embedding.parameters(), *embedding.buffers()))
        self.dense = model.memory["dense weights"] - tables
        self.per_expert = sum(layer.record_bytes for layer in model.store.layers)

    def gain(self, plain: Figures, guessed: Figures) -> float:
        """Tokens per byte with guesses over those without."""
        tokens_per_pass = plain.num_passes / guessed.num_passes
        return tokens_per_pass * self._of_pass(plain) / self._of_pass(guessed)

    def _of_pass(self, figures: Figures) -> float:
        return self.dense + self.per_expert * figures.experts_per_pass


def compared(answers: Answers, task: Task, speculator: Callable[[], Any], trials: int) -> dict[str, Any]:
    """An answer with guesses over one without. speculator: makes them, for each trial."""
    expected: list[int] = []
    last: dict[str, Figures] = {}

    def run(name: str, make: Callable[[], Any]) -> float:
        last[name] = answers.run(task, expected, make())
        return last[name].rate

    runs = {"off": partial(run, "off", lambda: None), "on": partial(run, "on", speculator)}
    rates = alternate(runs, num_trials=trials)
    bound = Bound(answers.model).gain(last["off"], last["on"])
    ratio = paired_ratio(rates, "on", "off")
    return {
        "ratio": ratio,
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
        "num_tokens": len(expected),
        "tokens_per_pass": last["off"].num_passes / last["on"].num_passes,
        "byte_bound": bound,
        "share_of_bound": {name: value / bound for name, value in ratio.items()},
    }


def show(name: str, found: dict[str, Any]) -> dict[str, Any]:
    ratio = found["ratio"]
    print(
        f"{name:<12} {ratio['median']:.2f} times ({ratio['min']:.2f} to {ratio['max']:.2f}), "
        f"{found['tokens_per_pass']:.2f} tokens a pass, byte bound {found['byte_bound']:.2f}"
    )
    return found


def replayed(answers: Answers, task: Task, rows: Sequence[int], trials: int) -> dict[str, Any]:
    answer: list[int] = []
    answers.run(task, answer)
    found: dict[str, Any] = {}
    for count in rows:
        make = partial(speculator_of, Replay(answer, count - 1))
        found[str(count)] = show(f"replay, {count}", compared(answers, task, partial(make, is_governed=False), trials))
        governed = compared(answers, task, partial(make, is_governed=True), trials)
        found[str(count)]["governed"] = show("  governed", governed)
    return found


def speculator_of(source: Any, *, is_governed: bool) -> Any:
    """Ungoverned, every guess is computed, whether it pays or not."""
    from offload_moe.residency.counters import Counters
    from offload_moe.speculate.costs import PassCosts
    from offload_moe.speculate.governor import EveryGuess
    from offload_moe.speculate.speculator import Speculator

    return Speculator(source, PassCosts(), Counters(), None if is_governed else EveryGuess())


def prose(answers: Answers, questions: Sequence[str], trials: int) -> dict[str, Any]:
    make = partial(answers.guesses, "auto")
    found = {question: compared(answers, answers.task(question), make, trials) for question in questions}
    worst = min(found, key=lambda question: found[question]["ratio"]["median"])
    show("prose, worst", found[worst])
    return {"worst": found[worst]["ratio"], "medians": {text: each["ratio"]["median"] for text, each in found.items()}}


@contextmanager
def loaded(options: argparse.Namespace, share: float | None, clock: Clock) -> Iterator[Answers]:
    """share: of the experts that have a slot; None for all."""
    from offload_moe import load

    ram = None
    if share is not None:
        with load(options.store, context=options.context) as model:
            ram = model.placement.ram.bytes_with(max(1, int(share * model.engine.hierarchy.pools.keys.total)))
    with load(options.store, ram=ram, context=options.context) as model:
        if share is None:
            fill(model)
        yield Answers(model, options.tokens, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=340, help="of an answer, at most")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=20, help="of prose")
    parser.add_argument("--rows", default="2,3,4,5,6,7,8")
    parser.add_argument(
        "--characters", type=int, default=None, help="of the texts, at most, for models of short context"
    )
    parser.add_argument(
        "--resident", type=float, default=0.4, help="share of the experts in RAM, with the rest on disk"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--replay-alone", action="store_true")
    alone.add_argument("--prose-alone", action="store_true")
    options = parser.parse_args()
    bind_to_cores(options.threads)
    import torch

    from offload_moe.native import kernels

    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    prompts = json.loads(PROMPTS.read_text("utf-8"))
    rows = [int(count) for count in options.rows.split(",")]
    document: dict[str, Any] = {}
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for suffix, share in (("", None), ("_disk", options.resident)):
        with loaded(options, share, clock if share is None else time.perf_counter) as answers:
            if options.replay_alone:
                document["replay"] = replayed(answers, answers.drawn_task(), rows, options.trials)
                break
            for name in () if options.prose_alone else ("edit", "json"):
                given = prompts[name]
                question = given["question"].format(text=given["text"][: options.characters])
                task, make = answers.task(question, given["answer"]), partial(answers.guesses, "ngram")
                for kind, each in (("", task), ("own_", answers.task(question))):
                    key = f"{kind}{name}{suffix}"
                    document[key] = show(key, compared(answers, each, make, options.trials))
                document[f"ngram_{name}{suffix}_ratio"] = document[f"{name}{suffix}"]["ratio"]
                if name == "edit" and share is None:
                    document["replay"] = replayed(answers, task, rows, options.trials)
            document[f"prose{suffix}"] = found = prose(answers, prompts["prose"][: options.prompts], options.trials)
            document[f"auto_prose{suffix}_worst_ratio"] = found["worst"]
    if "replay" in document:
        replays = document["replay"].values()
        worst = min((each["governed"]["ratio"] for each in replays), key=lambda ratio: float(ratio["median"]))
        document["replay_share_of_bound"] = spread([each["share_of_bound"]["median"] for each in replays])
        document["replay_auto_worst_ratio"] = worst
    finish(
        {
            "benchmark": "speculation",
            "label": "measured",
            "store": options.store,
            "threads": options.threads,
            "resident": options.resident,
            "acceptance": ACCEPTANCE,
            **document,
        }
    )


if __name__ == "__main__":
    main()
