"""The seam: a decoder's forward passes new tokens through a plan, and anything else through its modules.

Tokens of one sequence, in fp32 on the CPU, with a cache that has room, without padding, captures or gradients: a decode
step, a few tokens, or a prompt, where the plan takes prompts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from offload_moe.decode.hooks import Bypass, is_capturing
from offload_moe.decode.layer import RowsStep
from offload_moe.decode.next_token import TokenPass
from offload_moe.decode.plan import PassPlan
from offload_moe.decode.wiring import Wiring
from offload_moe.errors import UnsupportedModelError
from offload_moe.families.cache_name import cache_in, take_cache
from offload_moe.native.kernels import MAX_ROWS

logger = logging.getLogger(__name__)

NextTokens = tuple[Tensor, Any]  # ids ``[n]`` of one sequence, and the cache behind which they come


@dataclass(frozen=True, slots=True)
class SeveralCaches:
    """In place of a cache where a forward is given ids ``[1, T]`` of T sequences: the next token behind each cache."""

    caches: Sequence[Cache]


CAPTURES = {  # arguments, and what the config has in their place
    "output_hidden_states": "output_hidden_states",
    "output_attentions": "_output_attentions",
    "output_router_logits": "output_router_logits",
}


class Plan(Protocol):
    """What is asked before a pass."""

    wiring: Wiring
    bypass: Bypass
    takes_prompts: bool

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether so many tokens of a sequence may be passed behind this cache."""


class Seam:
    """In place of the forward of one decoder, whose hooks stay where they are."""

    plan: Plan
    token_pass: TokenPass | None = None  # where the pass has the output head

    def __init__(self, decoder: Any) -> None:
        self._modules_forward = decoder.forward
        self._settings = vars(decoder.config)
        self._attention = self._settings.get("_attn_implementation_internal")
        self._names = {module: name for name, module in decoder.named_modules()}
        self._has_said = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        several = cache_in(kwargs)
        if isinstance(several, SeveralCaches):
            output = self._pass_several(kwargs["input_ids"], several)
            if output is None:
                raise UnsupportedModelError("These sequences cannot be computed in one pass. Compute each alone.")
            return output
        output = None if args else self._pass(**kwargs)
        return self._by_modules(*args, **kwargs) if output is None else output

    def _pass_several(self, input_ids: Tensor, several: SeveralCaches) -> Any:
        """The next token of each of several sequences; None where they cannot be computed in one pass."""
        raise NotImplementedError

    def _by_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules_forward(*args, **kwargs)

    def takes(self, cache: Any, num_tokens: int) -> bool:
        """Whether the next tokens of a sequence go through the plan now, with the bits of each alone."""
        plan = self.plan
        is_clear = self._is_usual({}) and plan.fits(cache, num_tokens) and plan.bypass.is_clear
        return num_tokens <= MAX_ROWS and is_clear and self.has_graphs(num_tokens)

    def has_graphs(self, num_rows: int) -> bool:
        """Whether a pass may have so many rows; on a card, graphs for them are made at the first use, before
        anything is timed."""
        return num_rows <= MAX_ROWS

    def _pass(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """None where the modules have to do it; nothing has changed then."""
        cache = take_cache(others)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None) or not self._takes(given):
            return None
        if use_cache is False or return_dict is False or not self._is_usual(others):
            return None
        plan, num_tokens = self.plan, given.shape[1]
        if not self._has_place(cache, num_tokens):
            return None
        if not _sees_all(attention_mask, cache, num_tokens):
            return None
        if not plan.bypass.is_clear:
            self._say_why()
            return None
        wiring = plan.wiring
        positions = wiring.positions(position_ids, cache, num_tokens)
        if positions is None:
            return None
        return self._compute(input_ids, inputs_embeds, positions, cache)

    def _compute(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor, cache: Any) -> Any:
        """The pass itself, once everything around it is usual; None where it does not take these tokens."""
        raise NotImplementedError

    def _is_usual(self, others: dict[str, Any]) -> bool:
        """Whether no argument and no setting of the config requires anything else."""
        settings = self._settings
        return (
            not any(value is not None and value is not False for value in others.values())
            and settings.get("_attn_implementation_internal") == self._attention
            and not any(others.get(name) is None and settings.get(key) for name, key in CAPTURES.items())
            and not is_capturing()
        )

    def _takes(self, tokens: Tensor) -> bool:
        """Whether ``[B, T, ...]`` are tokens of one sequence, as many as a pass takes at once."""
        is_one = tokens.dim() > 1 and len(tokens) == 1 and tokens.shape[1] > 0
        return is_one and (tokens.shape[1] <= MAX_ROWS or self.plan.takes_prompts)

    def _has_place(self, cache: Any, num_tokens: int) -> bool:
        """Whether the cache takes so many tokens in place."""
        return self.plan.fits(cache, num_tokens)

    def _say_why(self) -> None:
        if self._has_said:
            return
        self._has_said = True
        changed = [self._names.get(module, "a module") for module in self.plan.bypass.changed_modules()]
        what = f"A forward hook, or a forward of its own, of {changed[0]}" if changed else "A hook of all modules"
        logger.warning("%s is not called on the fast path: tokens pass module by module, which takes longer.", what)


class DecoderForward(Seam):
    """Native spans and layers on the CPU."""

    plan: PassPlan
    head_alone: Bypass | None = None  # see `next_token.head_alone_of`

    def __init__(self, decoder: Any, plan: PassPlan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def _pass_several(self, input_ids: Tensor, several: SeveralCaches) -> Any:
        hidden = self.pass_rows(list(zip(input_ids[0].split(1), several.caches, strict=True)))
        return None if hidden is None else self.plan.wiring.make_output(hidden[None], several)

    def _has_place(self, cache: Any, num_tokens: int) -> bool:
        """A cache without tokens may get empty layers for that."""
        if isinstance(cache, Cache) and not cache.get_seq_length():
            self.plan.begin(cache)
        return super()._has_place(cache, num_tokens)

    def _compute(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor, cache: Any) -> Any:
        plan, wiring = self.plan, self.plan.wiring
        x = wiring.embed(input_ids, inputs_embeds)
        if x.dtype != torch.float32 or not x.is_cpu or x.requires_grad or not x.is_contiguous():
            return None
        step = RowsStep(wiring, positions, [cache] * positions.shape[-1])
        return wiring.make_output(wiring.finish(plan(x, step)), cache)

    def pass_rows(self, sequences: Sequence[NextTokens]) -> Tensor | None:
        """See `decode.pass_rows`."""
        plan, wiring, counts = self.plan, self.plan.wiring, [len(ids) for ids, _ in sequences]
        are_apart = wiring.is_by_position and len({id(cache) for _, cache in sequences}) == len(sequences)
        if not are_apart or not all(counts) or not 1 <= sum(counts) <= MAX_ROWS or not self._is_usual({}):
            return None
        if not all(plan.fits(cache, len(ids)) for ids, cache in sequences) or not plan.bypass.is_clear:
            return None
        x = wiring.embed(torch.cat([ids for ids, _ in sequences])[None], None)
        if x.dtype != torch.float32 or not x.is_cpu or x.requires_grad:
            return None
        caches = [cache for ids, cache in sequences for _ in ids]
        positions = torch.cat([wiring.next_positions(cache, len(ids)) for ids, cache in sequences], dim=1)
        return wiring.finish(plan(x, RowsStep(wiring, positions, caches)))[0]


def _sees_all(mask: Any, cache: Any, num_tokens: int) -> bool:
    """Whether an attention mask ``[1, S]`` hides nothing."""
    if mask is None:
        return True
    is_plain = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
    return is_plain and mask.shape == (1, cache.get_seq_length() + num_tokens) and bool(mask.all())
