"""`/metrics` of the ingress: its own series, and those of every replica with the replica's name."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass

from offload_moe.cluster.passage import Passage
from offload_moe.cluster.replicas import Lost, Replicas

PREFIX = "offload_moe_ingress_"
LIMIT_S = 3.0
SERIES = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


@dataclass(slots=True)
class Counts:
    """Since the ingress began. num_lost: times that a request has lost its replica."""

    num_requests: int = 0
    num_lost: int = 0
    num_characters: int = 0
    num_known: int = 0

    def add(self, passage: Passage) -> None:
        """A request that has ended."""
        self.num_requests += 1
        self.num_lost += passage.num_lost
        self.num_characters += passage.num_characters
        self.num_known += passage.num_known


async def metrics(replicas: Replicas, counts: Counts) -> str:
    """All series. A replica that does not answer is left out."""
    names = replicas.router.names
    texts = await asyncio.gather(*(_text_of(replicas, name) for name in names))
    own = [*_own(replicas, counts)]
    return "\n".join([*own, *_merged(dict(zip(names, texts, strict=True)))]) + "\n"


def _own(replicas: Replicas, counts: Counts) -> Iterator[str]:
    router = replicas.router
    yield from _series("replicas", "gauge", "Replicas that take requests.", len(router.names))
    yield from _series("requests_total", "counter", "Requests that have ended.", counts.num_requests)
    yield from _series("lost_total", "counter", "Times that a request has lost its replica.", counts.num_lost)
    text = "Characters of conversations that were sent to replicas."
    yield from _series("characters_total", "counter", text, counts.num_characters)
    text = "Those of them that the replica had been sent before."
    yield from _series("known_characters_total", "counter", text, counts.num_known)


def _series(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} {kind}"
    yield f"{PREFIX}{name} {value}"


async def _text_of(replicas: Replicas, name: str) -> str:
    async def read() -> str:
        async with asyncio.timeout(LIMIT_S), replicas.request(name, "GET", "/metrics") as response:
            return (await response.aread()).decode() if response.status_code == 200 else ""

    try:
        return await replicas.run(name, read())
    except (Lost, TimeoutError):
        return ""


def _merged(texts: dict[str, str]) -> Iterator[str]:
    """The series of one name stand together, below its comments, as the format has it."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        group: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP"):
                group = groups.setdefault(line.split()[2], [])
            if line.startswith("#"):
                group += [line] if line not in group else []
            elif found := SERIES.fullmatch(line):
                labels = ",".join(part for part in (f'replica="{name}"', found["labels"]) if part)
                group.append(f"{found['name']}{{{labels}}} {found['value']}")
    for group in groups.values():
        yield from group
