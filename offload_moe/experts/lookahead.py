"""Lookahead: the experts that the next MoE layers will choose, guessed and fetched before their routers run.

The residual stream changes slowly from layer to layer, so a later router's choice on the present residual is a good
guess of its choice later. Where a router cannot run early, the guess is what usually follows the experts of this layer.
The guess is made after a layer's demands are issued and before its experts are computed.

The likeliest experts of a guess are right far more often than the others. Only those ranks are fetched that have been
right often enough where they were absent; the other ranks are judged too, without being fetched.

A chunk of a prompt uses nearly every expert of every layer: the next layer's are fetched while this one computes.

Source: Eliseev and Mazur 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", section 3.2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_moe.experts.probe import ResidualCapture, RouterProbe
from offload_moe.native.kernels import FETCHED, MISSING
from offload_moe.residency.co_occurrence import CoOccurrence
from offload_moe.residency.prefetch import LayerTally, PrefetchGovernor, RankTally
from offload_moe.residency.scheduler import Scheduler

TOLERANCE = 1e-3
DEFAULT_DEPTH = 2
DISK_DEPTH = 2  # further layers that the RAM tier looks ahead, beyond those of the device tier: a disk is slower
RETRY_TOKENS = 64  # every so many tokens a depth that was given up guesses again
LEAST_CHUNK_SHARE = 0.8  # of a layer's experts that a chunk must be expected to use for all of them to be fetched


@dataclass(frozen=True, slots=True)
class _Absent:
    """The part of a guess that was not resident when it was made: ranks and experts, and the experts fetched."""

    guesses: list[tuple[int, int]]
    fetched: list[int]


class Lookahead:
    """Prefetches for one model."""

    def __init__(
        self,
        probes: Sequence[RouterProbe | None],
        scheduler: Scheduler,
        governor: PrefetchGovernor,
        depth: int,
        ram: Scheduler | None = None,
    ) -> None:
        """probes: one per MoE layer, None where its router cannot run early. depth: how many layers ahead.

        scheduler: the tier that computes. ram: the tier behind it, where it is another one.
        """
        self._probes = probes
        self._scheduler = scheduler
        self._ram = ram if ram is not scheduler else None
        self._depth = depth
        self._reach = depth + (DISK_DEPTH if self._ram is not None else 0)
        self.governor = governor
        self.tallies = [LayerTally() for _ in probes]
        self._by_rank: list[list[RankTally]] = [[] for _ in range(self._reach)]  # one list per depth
        self._is_on = self._has_begun = False
        self._residuals: dict[int, Tensor] = {}
        self._guesses: dict[int, list[int]] = {}  # layer -> the guess made one layer before
        self._absent: dict[int, dict[int, _Absent]] = {}  # layer -> how many layers before -> guesses absent then
        self._trusted: dict[int, bool] = {}
        self._habits: CoOccurrence | None = None
        for layer, probe in enumerate(probes):
            if probe is not None:
                probe.norm.register_forward_pre_hook(ResidualCapture(self._residuals, layer))
            else:
                self._fall_back()

    def route_ahead(self, layer: int, hidden: Tensor, num_experts_per_token: int) -> list[Tensor]:
        """The choices of the next layers' routers on the present residual: ids ``[1, K]`` each, as far as they can run.

        hidden: ``[T, H]``, the input of this layer's experts. A call for layer 0 begins a token.
        """
        residual = self._residuals.pop(layer, None)
        if len(hidden) != 1:
            return []
        if layer == 0:
            self._begin_token()
        if not self._is_on or residual is None or not self._is_trusted(layer, residual, hidden):
            return []
        chosen: list[Tensor] = []
        for ahead in self._worth_guessing(layer, num_experts_per_token):
            probe = self._probes[ahead]
            if probe is None or not self._trusted.get(ahead, True):
                break
            ids = probe.route(residual, num_experts_per_token).reshape(1, -1)
            if ids.shape[1] != num_experts_per_token:
                break
            chosen.append(ids)
        return chosen

    def after_acquire(
        self,
        layer: int,
        num_tokens: int,
        experts: Sequence[int],
        num_experts_per_token: int,
        ahead_ids: Sequence[list[int]],
    ) -> None:
        """Guess and prefetch for the layers behind `layer`, whose experts have been acquired.

        ahead_ids: the results of `route_ahead`, K ids each.
        """
        if num_tokens != 1:
            self.pause()
            self._prefetch_for_chunk(layer, num_tokens, experts, num_experts_per_token)
            return
        self._note(layer, experts)
        if not self._is_on:
            return
        keep = self._keys(layer, experts)
        for ahead in self._worth_guessing(layer, num_experts_per_token):
            depth = ahead - layer
            if depth <= len(ahead_ids):
                guessed = list(dict.fromkeys(ahead_ids[depth - 1]))
            else:
                guessed = self._guess_by_habit(layer, experts, depth, num_experts_per_token)
            if guessed:
                self._fetch(layer, ahead, guessed, self._num_ranks(depth, num_experts_per_token), keep)
                keep |= self._keys(ahead, guessed)

    def _worth_guessing(self, layer: int, k: int) -> list[int]:
        """Layers behind this one, down to a depth from which guesses have not been worth fetching."""
        behind = range(layer + 1, min(layer + 1 + self._reach, len(self._probes)))
        return list(itertools.takewhile(lambda ahead: self._num_ranks(ahead - layer, k), behind))

    def _guess_by_habit(self, layer: int, experts: Sequence[int], depth: int, k: int) -> list[int]:
        return self._habits.predict(layer, experts, depth, k) if self._habits is not None else []

    def num_ranks(self, layer: int, num_experts_per_token: int) -> list[int]:
        """How many of the likeliest experts to guess now, per layer behind this one.

        A call for layer 0 begins a token.
        """
        if layer == 0:
            self._begin_token()
        depths = range(1, self._reach + 1 if self._is_on else 1)
        ranks = (self._num_ranks(depth, num_experts_per_token) for depth in depths)
        return list(itertools.takewhile(bool, ranks))

    def can_be_spanned(self, num_layers: int) -> bool:
        """Whether the norm of every layer's router is verified, so that a native span may run the routers early."""
        is_whole = num_layers == len(self._probes) and self._habits is None
        return is_whole and all(self._trusted.get(layer, False) for layer in range(num_layers))

    def passed(
        self, layer: int, experts: Sequence[int], guesses: Sequence[list[int]], found: Sequence[Sequence[int]]
    ) -> None:
        """`after_acquire` of a layer in a span, which has run the next layers' routers and fetched what is worth it.

        guesses: one list of experts per layer behind this one. found: the state in which the span found each of them.
        """
        self._note(layer, experts)
        for ahead, (guessed, states) in enumerate(zip(guesses, found, strict=True), layer + 1):
            absent = [(rank, guessed[rank]) for rank, state in enumerate(states) if state in (MISSING, FETCHED)]
            fetched = [guessed[rank] for rank, state in enumerate(states) if state == FETCHED]
            self._keep_guess(layer, ahead, guessed, _Absent(absent, fetched))

    def pause(self) -> None:
        """A forward of several tokens comes between: nothing that was guessed before counts."""
        self.governor.pause()
        self._forget_guesses()

    def _note(self, layer: int, experts: Sequence[int]) -> None:
        """Record the choice of a layer's router for one token."""
        if self._habits is not None:
            self._habits.learn(layer, experts)
        if layer == 0:
            self._begin_token()
            self._has_begun = False
            self._forget_guesses()
        self._judge(layer, experts)

    def _begin_token(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._is_on = self.governor.begin_token()

    def _judge(self, layer: int, experts: Sequence[int]) -> None:
        """Compare the guesses for this layer with its router's choice."""
        for depth, absent in self._absent.pop(layer, {}).items():
            tallies = self._by_rank[depth - 1]
            for rank, expert in absent.guesses:
                tallies += [RankTally() for _ in range(rank + 1 - len(tallies))]
                tallies[rank].note(is_right=expert in experts)
            self.tallies[layer].note_fetched(absent.fetched, experts)
        if (guessed := self._guesses.pop(layer, None)) is not None:
            self.tallies[layer].note(guessed, experts)

    def _forget_guesses(self) -> None:
        self._guesses.clear()
        self._absent.clear()

    def _num_ranks(self, depth: int, num_experts_per_token: int) -> int:
        """How many of the likeliest guesses, `depth` layers ahead, are worth fetching; 0: no guess is made."""
        tallies = self._by_rank[depth - 1]
        num_worth = next((rank for rank, tally in enumerate(tallies) if not tally.is_worth_fetching), None)
        is_retried = num_worth == 0 and self.governor.num_tokens % RETRY_TOKENS == 0
        return num_experts_per_token if num_worth is None or is_retried else num_worth

    def _fetch(self, layer: int, ahead: int, guessed: list[int], num_ranks: int, keep: set[int]) -> None:
        self._note_guess(layer, ahead, guessed, num_ranks)
        self._bring(ahead, guessed[:num_ranks], keep, to_device=ahead - layer <= self._depth)

    def _note_guess(self, layer: int, ahead: int, guessed: list[int], num_ranks: int) -> None:
        """Keep a guess until its layer routes. num_ranks: how many of the likeliest are fetched where absent."""
        depth = ahead - layer
        tier = self._scheduler if depth <= self._depth or self._ram is None else self._ram
        absent = [(rank, expert) for rank, expert in enumerate(guessed) if not tier.is_known(ahead, expert)]
        fetched = [expert for rank, expert in absent if rank < num_ranks]
        self._keep_guess(layer, ahead, guessed, _Absent(absent, fetched))

    def _keep_guess(self, layer: int, ahead: int, guessed: list[int], absent: _Absent) -> None:
        if ahead == layer + 1:
            self._guesses[ahead] = guessed
        self._absent.setdefault(ahead, {})[ahead - layer] = absent

    def _bring(self, layer: int, experts: Sequence[int], keep: set[int], *, to_device: bool = True) -> None:
        """Prefetch into RAM first, and into the device what is in RAM: no copy to the device waits for a prefetch."""
        if self._ram is not None:
            self._ram.prefetch(layer, experts, keep)
            experts = self._ram.resident(layer, experts)
        if to_device:
            self._scheduler.prefetch(layer, experts, keep)

    def _prefetch_for_chunk(self, layer: int, num_tokens: int, experts: Sequence[int], k: int) -> None:
        if layer + 1 == len(self._probes):
            return
        present, following = self._scheduler.keys.num_experts[layer : layer + 2]
        used_share = 1 - (1 - k / following) ** num_tokens
        has_room = self._scheduler.residency.num_slots >= present + following
        if used_share >= LEAST_CHUNK_SHARE and has_room:
            self._bring(layer + 1, range(following), self._keys(layer, experts))

    def _keys(self, layer: int, experts: Sequence[int]) -> set[int]:
        return {*self._scheduler.keys.keys(layer, experts)}

    def _is_trusted(self, layer: int, residual: Tensor, hidden: Tensor) -> bool:
        """Whether the probe's norm is the one before these experts: checked once, by its result."""
        if layer not in self._trusted:
            probe = self._probes[layer]
            assert probe is not None
            normed = probe.norm.forward(residual)
            is_alike = normed.shape == hidden.shape and torch.allclose(normed, hidden, rtol=TOLERANCE, atol=TOLERANCE)
            self._trusted[layer] = is_alike
            if not self._trusted[layer]:
                self._fall_back()
        return self._trusted[layer]

    def _fall_back(self) -> None:
        """Some layer's router cannot run early: learn which experts usually follow."""
        if self._habits is None:
            self._habits = CoOccurrence(len(self._probes), self._scheduler.keys.most, self._depth)
