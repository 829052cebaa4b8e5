"""A cluster in which no replica starts, with a Ray that is made up: it gives up where another try is not worth it."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from offload_moe.cluster.failures import MOST_TRIES
from offload_moe.errors import BudgetError, OffloadMoeError


class RayError(Exception):
    """As Ray's: `cause` is the error of the task."""

    def __init__(self, text: str = "", cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


class Cluster:
    """errors: what the starts at an address end with, the last one for ever; None for a replica that stays."""

    def __init__(self, errors: dict[str, list[Exception | None]]) -> None:
        self.errors = errors
        self.starts = dict.fromkeys(errors, 0)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": address, "NodeManagerAddress": address, "Resources": {"CPU": 1}}
            for address in self.errors
        ]

    def remote(self, **_: object) -> Any:
        return lambda replica: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.actor))

    def actor(self, _: object, address: str) -> Any:
        async def start() -> Any:
            error = self.errors[address][min(self.starts[address], len(self.errors[address]) - 1)]
            self.starts[address] += 1
            if error is not None:
                raise error
            return SimpleNamespace(url="http://127.0.0.1:1", fingerprint="same")

        return SimpleNamespace(start=SimpleNamespace(remote=start), run=SimpleNamespace(remote=asyncio.Event().wait))

    def first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep until the first replica is there. Raises: OffloadMoeError where none comes."""
        keeper = importlib.import_module("offload_moe.cluster.keeper")
        for name in ("LOOK_S", "LEAST_WAIT_S", "MOST_WAIT_S"):
            monkeypatch.setattr(keeper, name, 0.001)

        async def keep() -> None:
            job = SimpleNamespace(options=SimpleNamespace(device="cpu", ram=1))
            made = keeper.Keeper(SimpleNamespace(add=lambda *_: None, remove=lambda _: None), job)
            keeping = asyncio.create_task(made.keep())
            await asyncio.wait([made.first, keeping], return_when=asyncio.FIRST_COMPLETED, timeout=5)
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            assert made.first.done(), "it goes on for ever"
            made.first.result()

        asyncio.run(keep())


@pytest.fixture
def made_up_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def use(errors: dict[str, list[Exception | None]]) -> Cluster:
        cluster = Cluster(errors)
        monkeypatch.delitem(sys.modules, "offload_moe.cluster.keeper", raising=False)
        for name, values in {
            "ray": {"remote": cluster.remote, "nodes": cluster.nodes, "kill": lambda _: None},
            "ray.util": {"get_node_ip_address": lambda: "here"},
            "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy": lambda *_, **__: None},
            "ray.exceptions": {"RayError": RayError},
        }.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["ray"].util = sys.modules["ray.util"]  # type: ignore[attr-defined]
        return cluster

    yield use
    sys.modules.pop("offload_moe.cluster.keeper", None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RayError("task failed\nmore", cause=MemoryError()), "MemoryError"),
        (RayError(cause=ImportError("libtorch.so: cannot open")), "ImportError: libtorch.so: cannot open"),
        (RayError("The actor died unexpectedly.\nmore"), "RayError: The actor died unexpectedly"),
        (ValueError("no such resource"), "ValueError: no such resource"),
    ],
)
def test_an_error_that_stays_ends_it_by_name(
    error: Exception, expected: str, made_up_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = made_up_ray({"one": [error], "two": [error]})
    with pytest.raises(OffloadMoeError, match=rf"{MOST_TRIES} attempts failed, the last one with {expected}\. Run"):
        cluster.first(monkeypatch)
    assert min(cluster.starts.values()) >= MOST_TRIES


def test_an_error_of_ours_is_final_at_once(made_up_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = made_up_ray({"one": [RayError(cause=BudgetError("too large"))]})
    with pytest.raises(BudgetError, match="too large"):
        cluster.first(monkeypatch)
    assert cluster.starts == {"one": 1}


def test_one_that_passes_is_waited_for(made_up_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    died = RayError("The actor died unexpectedly.")
    cluster = made_up_ray(
        {"one": [*[died] * (MOST_TRIES - 1), None], "two": [RayError(cause=BudgetError("too large"))]}
    )
    cluster.first(monkeypatch)
