"""Models that are closed, dropped, forked from and left behind at random points.

`python -m support.lifecycle_stress STORE SEED ROUNDS`, in the folder of the tests. Every answer that is computed to its
end is the one of an undisturbed model. Prints `done` before the exit, which comes at a random point, too.
"""

import contextlib
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from offload_moe import OffloadMoeError, load
from offload_moe.engine.model import Model
from offload_moe.errors import ModelClosed

PROMPT, NUM_TOKENS = "Hi", 6
CHILD_LIMIT_S = 60
Use = Callable[["Stress"], None]


class Stress:
    """random: of the seed. expected: the answer to `PROMPT`."""

    def __init__(self, store: Path, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        with self.load_with(None) as model:
            self.plan = model.placement.ram
            self.expected = self.answer(model)
        assert self.expected
        self.left: list[object] = []  # for the interpreter to find at exit

    def load_with(self, ram: int | None) -> Model:
        return load(self.store, context=256, ram=ram)

    def load(self) -> Model:
        return self.load_with(self.random.choice([None, self.plan.bytes_with(4), self.plan.bytes_with(7)]))

    def answer(self, model: Model) -> str:
        return model.generate(PROMPT, max_new_tokens=NUM_TOKENS, temperature=0)

    def nap(self) -> None:
        time.sleep(self.random.random() * 0.02)


def closed(stress: Stress) -> None:
    with stress.load() as model:
        assert stress.answer(model) == stress.expected
    try:
        stress.answer(model)
    except ModelClosed:
        return
    raise AssertionError("a closed model answered")


def dropped(stress: Stress) -> None:
    model = stress.load()
    stream = model.stream(PROMPT, max_new_tokens=100, temperature=0)
    if stress.random.random() < 0.5:
        next(stream)
    del model, stream
    if stress.random.random() < 0.7:
        gc.collect()


def closed_in_a_stream(stress: Stress) -> None:
    model = stress.load()
    stream = model.stream(PROMPT, max_new_tokens=150, temperature=0)
    text = next(stream)
    closer = threading.Thread(target=lambda: (stress.nap(), model.close()))
    closer.start()
    with contextlib.suppress(ModelClosed):
        "".join(stream)
    closer.join()
    assert text[0] == stress.expected[0]


def closed_in_a_forward(stress: Stress) -> None:
    model = stress.load()
    closer = threading.Thread(target=lambda: (stress.nap(), model.close()))
    closer.start()
    with contextlib.suppress(ModelClosed), torch.inference_mode():
        for _ in range(200):
            model.hf(torch.tensor([[3, 17, 5]]))
    closer.join()
    model.close()


def forked(stress: Stress) -> None:
    """At rest or in the middle of a stream; the parent goes on."""
    model = stress.load()
    stream = model.stream(PROMPT, max_new_tokens=NUM_TOKENS, temperature=0)
    text = next(stream) if stress.random.random() < 0.5 else ""
    child = os.fork()
    if child == 0:
        in_child(stress, model)
    text += "".join(stream)
    assert text == stress.expected, text
    end = time.monotonic() + CHILD_LIMIT_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < end, "the child hangs"
        time.sleep(0.005)
    assert ended[1] == 0, ended
    assert stress.answer(model) == stress.expected
    stress.random.choice([model.close, gc.collect])()


def in_child(stress: Stress, model: Model) -> None:
    try:
        stress.answer(model)
        os._exit(3)
    except OffloadMoeError as error:
        if "forked" not in str(error):
            raise
    if stress.random.random() < 0.5:
        model.close()
        del model
        gc.collect()
    if stress.random.random() < 0.5:
        with stress.load() as own:
            assert stress.answer(own) == stress.expected
    stress.random.choice([sys.exit, os._exit])(0)


def left_behind(stress: Stress) -> None:
    model = stress.load()
    stream = model.stream(PROMPT, max_new_tokens=150, temperature=0)
    next(stream)
    stress.left.append(stress.random.choice([model, stream, (model, stream)]))


def computed_by_a_daemon(stress: Stress) -> None:
    model = stress.load()

    ids = torch.tensor([[3, 17, 5]])  # here: at exit a thread that is in torch beside a pass may abort the process

    def work() -> None:
        with torch.inference_mode():
            while True:
                model.hf(ids)

    threading.Thread(target=work, daemon=True).start()
    stress.nap()


ROUNDS: list[Use] = [closed, dropped, closed_in_a_stream, closed_in_a_forward, forked]
ENDS: list[Use] = [left_behind, computed_by_a_daemon, dropped]


def main(store: Path, seed: int, num_rounds: int) -> None:
    torch.set_num_threads(2)
    gc.freeze()  # imported modules, which every collection would go through
    stress = Stress(store, seed)
    rounds = ROUNDS * (num_rounds // len(ROUNDS) + 1)
    for use in stress.random.sample(rounds, len(rounds))[:num_rounds]:
        use(stress)
    for use in stress.random.sample(ENDS, 2):
        use(stress)
    print("done", flush=True)
    if stress.random.random() < 0.2:
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
