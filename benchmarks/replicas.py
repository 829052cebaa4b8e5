"""Requests routed among 2 to 64 replicas: the prompts that are found computed, and how long requests wait. Simulated.

    python benchmarks/replicas.py [--replicas 2,4,8,16,32,64] [--users 1,2,4] [--hours 1] [--seeds 1,2]

Conversations are drawn, time is calculated; the ingress's own `Router` decides where a request goes, and the server's
own `Prefixes` (eight caches within the context) what is found there. A replica answers one request after another:
tokens of the prompt that are new there, then those of the answer, at the given rates.

Each user has one conversation after another, and a turn after the answer of the last one and a pause. Three of four
chat: one of eight system prompts of 50 to 1,500 tokens, about five turns, a minute between two. One of four is an
agent: one of three system prompts of 6,000 tokens, about twenty turns, two seconds between two. A conversation ends
where it would exceed the context.

round robin   in turn
least loaded  where the fewest requests are under way, then in turn
hash          by the user's first message, at most half as many requests again as the mean: HAProxy in docs/scale.md
prefix        the ingress

hit_rate      tokens of prompts that were found computed; `possible`: those that any replica had computed before
queue_s       from a request to its beginning at the replica; first_token_s: to its first token
answers       in an hour, of each replica

`users` are those of each replica; figures are means over the seeds.

The last line of stdout is one JSON document.
"""

import argparse
import hashlib
import heapq
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any, Protocol

from harness import finish

from offload_moe.cluster.chains import Chain
from offload_moe.cluster.router import ANSWER, Router
from offload_moe.serve.prefixes import Prefixes

CHARACTERS = 4  # of a token
WARM_UP = 0.2  # of the time
SLOTS = 8  # caches of a server

Piece = tuple[int, int]  # an identity, and tokens


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, or what a cache holds. Its pieces are whole: two texts share those that both begin with."""

    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(tokens for _, tokens in self.pieces)

    def shared(self, other: "Text") -> int:
        total = 0
        for one, two in zip(self.pieces, other.pieces, strict=False):
            if one != two:
                break
            total += one[1]
        return total

    def chain(self) -> Chain:
        """As `chain_of` makes one of a conversation."""
        keys: list[object] = []
        lengths: list[int] = []
        for piece, tokens in self.pieces:
            keys.append((keys[-1] if keys else None, piece).__hash__())
            lengths.append((lengths[-1] if lengths else 0) + CHARACTERS * tokens)
        return Chain(keys, lengths)


class Cache:
    """What `Prefixes` needs of a `PrefixCache`."""

    is_parked = False
    num_bytes = 0

    def __init__(self, text: Text = Text(())) -> None:
        self.text = text

    @property
    def num_tokens(self) -> int:
        return len(self.text)

    def num_usable(self, text: Text) -> int:
        return min(self.text.shared(text), len(text) - 1)

    def num_lost(self, text: Text) -> int:
        return len(self.text) - self.num_usable(text)

    def fork(self, text: Text) -> "Cache":
        return Cache(self.text)

    def park(self) -> None:
        pass

    unpark = park


@dataclass(slots=True)
class Conversation:
    """Of one user, one after another."""

    rng: random.Random
    is_agent: bool
    identities: "count[int]"
    systems: dict[tuple[bool, int], Piece]
    pieces: list[Piece] = field(default_factory=list)
    turns_left: int = 0

    def begin(self) -> None:
        which = self.rng.randrange(3 if self.is_agent else 8)
        self.pieces = [self.systems[self.is_agent, which]]
        self.turns_left = 1 + int(self.rng.expovariate(1 / (20 if self.is_agent else 5)))

    def ask(self) -> Text:
        self.turns_left -= 1
        self.pieces.append((next(self.identities), self._tokens(400 if self.is_agent else 60)))
        return Text(tuple(self.pieces))

    def answer(self) -> int:
        tokens = self._tokens(120 if self.is_agent else 250)
        self.pieces.append((next(self.identities), tokens))
        return tokens

    def pause(self) -> float:
        return self.rng.expovariate(1 / (2 if self.is_agent else 60))

    def _tokens(self, median: int) -> int:
        return max(8, min(3000, int(median * math.exp(self.rng.gauss(0, 0.8)))))


class Policy(Protocol):
    def take(self, text: Text) -> int:
        """The replica of a request."""

    def end(self, replica: int, text: Text) -> None: ...


class RoundRobin:
    def __init__(self, num_replicas: int) -> None:
        self._numbers, self._num_replicas = count(), num_replicas

    def take(self, text: Text) -> int:
        return next(self._numbers) % self._num_replicas

    def end(self, replica: int, text: Text) -> None:
        pass


class LeastLoaded:
    def __init__(self, num_replicas: int) -> None:
        self.running = [0] * num_replicas
        self._used_at, self._clock = [0] * num_replicas, count(1)

    def take(self, text: Text) -> int:
        chosen = min(range(len(self.running)), key=lambda each: (self.running[each], self._used_at[each]))
        return self.begin(chosen)

    def begin(self, chosen: int) -> int:
        self._used_at[chosen] = next(self._clock)
        self.running[chosen] += 1
        return chosen

    def end(self, replica: int, text: Text) -> None:
        self.running[replica] -= 1


class Hash(LeastLoaded):
    """The next one in an order of the message's own, where the first has too much."""

    def take(self, text: Text) -> int:
        first = text.pieces[1][0]
        most = math.ceil(1.5 * (sum(self.running) + 1) / len(self.running))
        order = sorted(range(len(self.running)), key=lambda each: hashlib.md5(b"%d %d" % (first, each)).digest())
        return self.begin(next(each for each in order if self.running[each] < most))


class Prefix:
    def __init__(self, num_replicas: int, answer: int = ANSWER) -> None:
        self._router = Router(answer=answer)
        self._tickets: dict[int, Any] = {}
        for number in range(num_replicas):
            self._router.add(str(number))

    def take(self, text: Text) -> int:
        ticket = self._router.take(text.chain())
        assert ticket is not None
        self._tickets[id(text)] = ticket
        return int(ticket.name)

    def end(self, replica: int, text: Text) -> None:
        self._router.give_back(self._tickets.pop(id(text)))


POLICIES = {"round robin": RoundRobin, "least loaded": LeastLoaded, "hash": Hash, "prefix": Prefix}


@dataclass(slots=True)
class Request:
    conversation: Conversation
    text: Text
    asked_at: float


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was answered, with seconds."""

    queue_s: float
    first_token_s: float
    num_prompt: int
    num_cached: int
    num_possible: int


class Replica:
    """A server: its queue and its caches."""

    def __init__(self, context: int) -> None:
        self.prefixes = Prefixes(Cache, most=SLOTS, budget_tokens=context)  # type: ignore[arg-type]
        self.waiting: deque[Request] = deque()
        self.is_busy = False


class Simulation:
    """Events in the order of their times."""

    def __init__(self, policy: Policy, num_replicas: int, users: int, seed: int, options: argparse.Namespace) -> None:
        self._policy, self._options = policy, options
        self._replicas = [Replica(options.context) for _ in range(num_replicas)]
        self._events: list[tuple[float, int, Any]] = []
        self._order = count()
        self._seen: set[object] = set()
        self.served: list[tuple[float, Served]] = []
        identities = count()
        rng = random.Random(seed)
        systems = {(False, each): (next(identities), rng.randrange(50, 1500)) for each in range(8)}
        systems |= {(True, each): (next(identities), 6000) for each in range(3)}
        for user in range(users * num_replicas):
            rng = random.Random(f"{seed} {user}")
            conversation = Conversation(rng, user % 4 == 3, identities, systems)
            conversation.begin()
            self._at(conversation.pause(), lambda now, each=conversation: self._ask(now, each))

    def run(self) -> "Simulation":
        while self._events and self._events[0][0] < 3600 * self._options.hours:
            now, _, event = heapq.heappop(self._events)
            event(now)
        return self

    def _at(self, time_s: float, event: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def _ask(self, now: float, conversation: Conversation) -> None:
        text = conversation.ask()
        number = self._policy.take(text)
        replica = self._replicas[number]
        replica.waiting.append(Request(conversation, text, now))
        if not replica.is_busy:
            self._begin(now, number)

    def _begin(self, now: float, number: int) -> None:
        replica, options = self._replicas[number], self._options
        request = replica.waiting.popleft()
        replica.is_busy = True
        cache: Any = replica.prefixes.lend(request.text)  # type: ignore[arg-type]
        num_cached = cache.num_usable(request.text)
        num_answer = request.conversation.answer()
        first_s = now + (len(request.text) - num_cached) / options.prompt_rate
        possible = self._possible(request.text)
        self.served.append(
            (now, Served(now - request.asked_at, first_s - request.asked_at, len(request.text), num_cached, possible))
        )
        cache.text = Text(tuple(request.conversation.pieces))
        self._seen.update(cache.text.chain().keys)
        self._at(first_s + num_answer / options.decode_rate, lambda at: self._end(at, number, request, cache))

    def _end(self, now: float, number: int, request: Request, cache: Any) -> None:
        replica, conversation = self._replicas[number], request.conversation
        replica.prefixes.give_back(cache)
        self._policy.end(number, request.text)
        replica.is_busy = False
        if conversation.turns_left <= 0 or len(cache.text) > self._options.context - 4000:
            conversation.begin()
        self._at(now + conversation.pause(), lambda at: self._ask(at, conversation))
        if replica.waiting:
            self._begin(now, number)

    def _possible(self, text: Text) -> int:
        """Tokens that were a part of any request or answer before."""
        chain = text.chain()
        ends = [end for key, end in zip(chain.keys, chain.lengths, strict=True) if key in self._seen]
        return min(max(ends, default=0) // CHARACTERS, len(text) - 1)


def figures(simulation: Simulation, num_replicas: int, hours: float) -> dict[str, float]:
    begin_at = WARM_UP * 3600 * hours
    served = [each for at, each in simulation.served if at >= begin_at]
    prompts = sum(each.num_prompt for each in served)
    queue, first = ([getattr(each, name) for each in served] for name in ("queue_s", "first_token_s"))
    return {
        "hit_rate": sum(each.num_cached for each in served) / prompts,
        "possible": sum(each.num_possible for each in served) / prompts,
        "queue_s_mean": statistics.mean(queue),
        "queue_s_p95": statistics.quantiles(queue, n=20)[-1],
        "first_token_s_median": statistics.median(first),
        "first_token_s_p95": statistics.quantiles(first, n=20)[-1],
        "answers": len(served) / ((1 - WARM_UP) * hours * num_replicas),
    }


def simulated(options: argparse.Namespace, users: int, num_replicas: int, name: str) -> dict[str, float]:
    """Means over the seeds."""
    found = []
    for seed in options.seeds:
        policy = Prefix(num_replicas, options.answer) if name == "prefix" else POLICIES[name](num_replicas)
        done = Simulation(policy, num_replicas, users, seed, options).run()
        found.append(figures(done, num_replicas, options.hours))
    return {figure: statistics.mean(each[figure] for each in found) for figure in found[0]}


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=numbers, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--users", type=numbers, default=[1, 2, 4], help="of each replica")
    parser.add_argument("--hours", type=float, default=1.0, help="simulated")
    parser.add_argument("--seeds", type=numbers, default=[1, 2])
    parser.add_argument("--context", type=int, default=32768, help="tokens that a replica keeps")
    parser.add_argument("--prompt-rate", type=float, default=130.0, help="tokens of a prompt per second")
    parser.add_argument("--decode-rate", type=float, default=15.0, help="tokens of an answer per second")
    parser.add_argument("--answer", type=int, default=ANSWER, help="characters of a prompt that an answer counts as")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for users, num_replicas, name in product(options.users, options.replicas, POLICIES):
        each = simulated(options, users, num_replicas, name)
        found.setdefault(f"{users} users", {}).setdefault(str(num_replicas), {})[name] = each
        print(
            f"{users} users of each of {num_replicas:2} replicas, {name:12}: found {each['hit_rate']:.2f} of "
            f"{each['possible']:.2f}, waits {each['queue_s_mean']:.1f} s (p95 {each['queue_s_p95']:.0f}), first token "
            f"{each['first_token_s_median']:.1f} s (p95 {each['first_token_s_p95']:.0f}), "
            f"{each['answers']:.0f} answers an hour",
            flush=True,
        )
    finish({"benchmark": "replicas", "label": "simulated", "inputs": vars(options), "results": found})


if __name__ == "__main__":
    main()
