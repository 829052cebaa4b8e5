"""The real copier on torch's real streams and events, as far as a CPU build has them: what is asked, in which order.

The simulated accelerator proves that this order is right; here it is shown to be the order a device is given.
"""

import pytest
import torch
from support.cuda_guard import cuda_guard_missing, guard_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_moe.memory import copier as copier_module
from offload_moe.memory.copier import AcceleratorCopier
from offload_moe.memory.page_lock import PageLock

CUDA = torch.device("cuda", 0)


class Answer(PageLock):
    """Says of all memory what it is told to."""

    def __init__(self, is_locked: bool) -> None:
        super().__init__(None)
        self.is_locked = is_locked

    def holds(self, memory: Tensor) -> bool:
        return self.is_locked


class UnenteredStream(torch.Stream):
    """Making a stream the current one of a thread is what a CPU build cannot do."""

    def __enter__(self) -> "UnenteredStream":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _guard() -> None:
    if torch.backends.cuda.is_built():
        pytest.skip("this torch has CUDA: tests/gpu asks the card itself")
    if reason := cuda_guard_missing():
        pytest.skip(reason)
    guard_calls()


def numbers(calls: list[str]) -> list[str]:
    """The calls with streams and events renumbered in the order they appear."""
    seen: dict[str, str] = {}
    renamed = []
    for call in calls:
        words = call.split()
        for place in range(1, len(words)):
            if words[place].isdigit():
                name = f"{words[place - 1]} {words[place]}"
                words[place] = seen.setdefault(name, str(sum(key.startswith(words[place - 1]) for key in seen) + 1))
        renamed.append(" ".join(words))
    return renamed


@pytest.mark.parametrize("is_locked", [True, False])
def test_what_a_copy_asks_of_streams_and_events(is_locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier_module, "STAGING_BYTES", 4096)
    monkeypatch.setattr(copier_module, "NUM_STAGING_BUFFERS", 2)
    monkeypatch.setattr(AcceleratorCopier, "new_stream", lambda copier: UnenteredStream(CUDA))
    with FakeTensorMode():
        copier = AcceleratorCopier(CUDA, Answer(is_locked))
        monkeypatch.setattr(copier, "staging_buffer", lambda size: torch.empty(size, dtype=torch.uint8))
        compute = torch.Stream(CUDA)
        monkeypatch.setattr(copier, "current_stream", lambda: compute)
        source, target = torch.empty(3 * 4096, dtype=torch.uint8), copier.allocate(3 * 4096)
        assert target.device == CUDA
        copier.copy(source, target, after=[copier.mark()]).wait()
    pieces = [
        "record event 2 on stream 2",
        "record event 3 on stream 2",
        "the host waits for event 2",
        "record event 2 on stream 2",
    ]
    last = "2" if is_locked else "4"
    assert numbers(guard_calls()) == [
        "record event 1 on stream 1",
        "stream 2 waits for event 1",
        *([] if is_locked else pieces),
        f"record event {last} on stream 2",
        f"the host waits for event {last}",
    ]
