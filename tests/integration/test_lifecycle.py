"""Close, drop, fail to load: a model that is gone says so, and gives back what it had."""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.chat import chat_store
from support.models import open_model
from support.tiny_models import FAMILIES, tiny_model

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.errors import ModelClosed, OffloadMoeError

IDS = torch.tensor([[3, 17, 5, 80, 41]])
Use = Callable[[Model], object]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(params=[None, 4], ids=["resident", "from disk"])
def model(request: pytest.FixtureRequest, store: Path) -> Iterator[Model]:
    with open_model(store, request.param, context=256) as model:
        yield model


def held() -> tuple[int, int]:
    """Threads and files of this process, once garbage is collected."""
    gc.collect()
    process = psutil.Process()
    return process.num_threads(), process.num_fds()


def assert_given_back(before: tuple[int, int]) -> None:
    """A thread counts for a moment after its last word."""
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.01)


def trace(model: Model) -> None:
    with model.trace():
        pass


def call_experts(model: Model) -> object:
    hidden = model.hf.config.hidden_size
    experts = model.layers[0].module
    return experts(torch.ones(1, hidden), torch.tensor([[0, 1]]), torch.ones(1, 2))


def decode_a_layer(model: Model) -> object:
    """Past the check of the decoder, as somebody who calls layers himself."""
    decoder = model.hf.get_decoder()
    decoder._forward_pre_hooks.clear()
    return model.hf.generate(IDS, max_new_tokens=3, do_sample=False)


USES: dict[str, Use] = {
    "generate": lambda model: model.generate("Hi", max_new_tokens=2),
    "stream": lambda model: list(model.stream("Hi", max_new_tokens=2)),
    "chat": lambda model: model.chat(),
    "trace": trace,
    "hf": lambda model: model.hf(IDS),
    "hf.generate": lambda model: model.hf.generate(IDS, max_new_tokens=2),
    "decoder": lambda model: model.hf.get_decoder()(IDS),
    "experts": call_experts,
    "layers": decode_a_layer,
    "resize": lambda model: model.engine.hierarchy.resize("ram", 2),
    "prompt": lambda model: model.hf(IDS.repeat(2, 8)),
}


def test_every_use_of_a_closed_model_says_so(model: Model) -> None:
    session = model.chat()
    assert list(session.send("Hi", max_new_tokens=4, temperature=0))
    hits = model.stats.num_hits
    model.close()
    model.close()
    uses = {**USES, "session": lambda _: list(session.send("More", max_new_tokens=2))}
    for name, use in uses.items():
        with torch.no_grad(), pytest.raises(ModelClosed, match=r"closed\. Load it again"):
            print(name, use(model))
    assert model.stats.num_hits == hits > 0
    assert model.memory["expert slots in RAM"] == 0
    assert model.peaks


def test_closing_ends_a_stream_of_another_thread(model: Model) -> None:
    before = held()[0] - 1
    stream = model.stream("Tell me", max_new_tokens=200, temperature=0)
    assert next(stream)
    closers = [threading.Thread(target=model.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    with contextlib.suppress(ModelClosed):  # or the answer was complete
        assert list(stream)
    for closer in closers:
        closer.join(30)
        assert not closer.is_alive()
    assert_given_back((before, 1 << 20))
    with pytest.raises(ModelClosed):
        model.generate("Hi")


def test_close_from_within_a_pass_releases_at_its_end(model: Model) -> None:
    """As a signal handler does it in the thread that computes."""
    experts = model.engine.experts[1]
    inner, called = experts._compute, []

    def compute(*arguments: object) -> object:
        model.close()
        called.append(model.engine.hierarchy.arena.num_slots)
        return inner(*arguments)

    experts._compute = compute
    with torch.no_grad(), pytest.raises(ModelClosed):
        model.hf(IDS)
    assert called[0] > 0
    assert model.engine.hierarchy.arena.num_slots == 0


def test_an_interrupt_in_a_pass_leaves_the_model_usable(model: Model) -> None:
    experts = model.engine.experts[1]
    inner = experts._compute
    experts._compute = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model.hf(IDS)
    experts._compute = inner
    assert len(model.generate("Hi", max_new_tokens=3, temperature=0)) > 0
    model.close()
    assert model.engine.hierarchy.arena.num_slots == 0


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, marks=pytest.mark.slow) if each in ("mixtral", "gpt_oss") else each
        for each in sorted(FAMILIES)
    ],
)
def test_a_dropped_model_is_freed(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    path = quantize(tmp_path / "model", tmp_path / "store")
    before = held()
    for num_slots in (None, 8):
        model = open_model(path, num_slots, context=256)
        assert model.hf.generate(IDS, max_new_tokens=4, do_sample=False, disable_compile=True).shape == (1, 9)
        parts = [weakref.ref(part) for part in (model, model.hf, model.engine.hierarchy, model.engine.hierarchy.arena)]
        assert held()[0] > before[0]
        del model
        assert_given_back(before)
        assert [part() for part in parts] == [None] * len(parts)


def test_the_transformers_model_alone_keeps_everything_in_use(store: Path) -> None:
    hf = open_model(store, 4, context=256).hf
    gc.collect()
    assert hf.generate(IDS, max_new_tokens=4, do_sample=False, disable_compile=True).shape == (1, 9)


def test_a_load_that_fails_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OffloadMoeError("no tokenizer today")

    before = held()
    monkeypatch.setattr("offload_moe.engine.load.load_tokenizer", fail)
    with pytest.raises(OffloadMoeError, match="today"):
        load(store, context=256)
    assert_given_back(before)
