"""The seam: a decoder's forward takes a few new tokens through the device pass, and all others through its modules."""

import threading
from typing import Any

from torch import Tensor, nn

from offload_moe.card.model import DecoderParts
from offload_moe.card.passes import CardPass
from offload_moe.card.ranges import named
from offload_moe.card.states import give_back
from offload_moe.decode.forward import Seam, SeveralCaches
from offload_moe.decode.hooks import Bypass
from offload_moe.decode.next_token import Draw, TokenPass, Wanted
from offload_moe.families.cache_name import cache_in
from offload_moe.native.constants import MAX_ROWS


class CardPlan:
    """What `CardForward` checks before a pass."""

    takes_prompts = False

    def __init__(self, parts: DecoderParts, card: CardPass) -> None:
        self.wiring, self.card = parts.wiring, card
        self._bound = [layer.bound for layer in parts.layers if layer.bound is not None]
        modules = [module for layer in parts.layers for module in layer.module.modules()]
        observed = [layer.module._forward_pre_hooks for layer in parts.layers]
        for layer in parts.layers:
            if layer.spec.before_mlp is not None:
                observed.append(layer.module.get_submodule(layer.spec.before_mlp.path)._forward_pre_hooks)
            if layer.spec.router is not None:
                observed.append(layer.module.get_submodule(layer.spec.router.path)._forward_hooks)
        self.bypass = Bypass(modules, observed)

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether so many tokens may be passed behind this cache; layers that are recorded are called as modules."""
        return self.card.rooms.fits(cache, num_tokens) and all(bound.recorder is None for bound in self._bound)


class CardForward(Seam):
    """In place of the forward of one decoder. Its argument `wanted`: see `offload_moe.decode.next_token`."""

    plan: CardPlan

    def __init__(self, decoder: Any, plan: CardPlan, hf: nn.Module, head: nn.Module | None) -> None:
        """head: the output head, where the pass has it."""
        super().__init__(decoder)
        self.plan = plan
        self.token_pass = None if head is None else CardTokens(plan.card, Bypass([hf, head], ()))
        self._thread = _Thread()

    def __call__(self, *args: Any, wanted: Wanted | None = None, **kwargs: Any) -> Any:
        self._thread.wanted = wanted
        return super().__call__(*args, **kwargs)

    def _by_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.plan.card.begin_other_forward()
        give_back(cache_in(kwargs))
        with named("forward by modules"):
            return super()._by_modules(*args, **kwargs)

    def _pass_several(self, input_ids: Tensor, several: SeveralCaches) -> Any:
        plan, caches, ids = self.plan, several.caches, input_ids[0].tolist()
        are_apart = len({id(cache) for cache in caches}) == len(caches) == len(ids) <= MAX_ROWS
        is_usual = are_apart and self._is_usual({}) and plan.bypass.is_clear
        if not is_usual or not all(plan.fits(cache) for cache in caches):
            return None
        places, wanted = [cache.get_seq_length() for cache in caches], self._thread.wanted
        return self._output(plan.card.run(ids, places, caches, wanted), several, wanted)

    def has_graphs(self, num_rows: int) -> bool:
        return self.plan.card.has_graphs(num_rows)

    def _compute(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor, cache: Any) -> Any:
        if input_ids is None or positions.dim() != 2:
            return None
        places = positions[0].tolist()
        if places != list(range(places[0], places[0] + len(places))):
            return None
        wanted = self._thread.wanted
        return self._output(
            self.plan.card.run(input_ids[0].tolist(), places, [cache] * len(places), wanted), cache, wanted
        )

    def _output(self, hidden: Tensor, cache: Any, wanted: Wanted | None) -> Any:
        if wanted is None:
            hidden = hidden.to(next(self.plan.wiring.norm.parameters()).dtype, copy=True)
        return self.plan.wiring.make_output(hidden[None], cache)


class _Thread(threading.local):
    """Of each thread: what its call takes from a pass."""

    wanted: Wanted | None = None


class CardTokens(TokenPass):
    """Tokens that passes of the card choose."""

    def __init__(self, card: CardPass, bypass: Bypass) -> None:
        self._card, self._bypass = card, bypass

    @property
    def is_clear(self) -> bool:
        return self._bypass.is_clear

    def choose(self, logits: Tensor, position: int, draw: Draw) -> int:
        return self._card.choose(logits, position, draw)

    def count(self, choice_s: float | None = None) -> None:
        counters = self._card.hierarchy.counters
        if choice_s is None:
            counters.num_chosen_on_card += 1
        else:
            counters.num_chosen_from_logits += 1
            counters.choice_s += choice_s
