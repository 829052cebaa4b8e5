"""Room for contexts that grow: what keys and values need beyond the plan, expert slots give up in time.

Asked before a prompt is computed, and before every forward, when no expert is leased by it.
"""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache

from offload_moe.errors import BudgetError
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement
from offload_moe.plan.working import activation_bytes, cache_bytes
from offload_moe.sizes import format_size

STEP = 128  # tokens that room is made for at once
GROWING = ("key/value cache", "activations")  # parts of the plan
UNBOUNDED = 1 << 24  # tokens, for models that set no bound

Resize = Callable[[int], int]


class ContextRoom:
    """The fast tier's slots against the caches that are alive. Safe to use from several threads."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, placement: Placement, resize: Resize) -> None:
        """resize: changes the number of the fast tier's slots, and returns how many there are then."""
        self._shape, self._dtype, self._placement, self._resize = shape, dtype, placement, resize
        self._tokens: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()  # room was made for, batch included
        self._is_decoding = False  # whether room was last made for a single token
        self._lock = threading.Lock()
        fast = placement.fast
        wanted = sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)
        self.num_slots = fast.num_slots
        self._least_slots = min(fast.num_slots, wanted)
        planned = (part.num_bytes for part in fast.fixed if part.name in GROWING)
        left_over = max(0, (fast.budget_bytes or 0) - fast.used_bytes)  # where every expert has a slot
        self._planned_bytes = sum(planned) + left_over

    @property
    def num_slots_given_up(self) -> int:
        return self._placement.fast.num_slots - self.num_slots

    def limit(self, num_tokens: int, num_new: int, cache: Cache | None = None) -> int:
        """The most tokens, prompt and answer together, that a conversation may grow to.

        num_tokens: of the prompt. num_new: those of them that are computed at once.

        Raises: BudgetError when memory has no room for the prompt and a first token.
        """
        with self._lock:
            room = self._planned_bytes + self._spare_bytes - self._others(cache)
        low, high = 0, self._shape.max_context or UNBOUNDED
        while low < high:  # the longest that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._need(middle, 1) <= room else (low, middle - 1)
        if low <= num_tokens or self._need(num_tokens, num_new) > room:
            needed = format_size(self._need(num_tokens + 1, num_new))
            fast = self._placement.fast.name.lower()
            raise BudgetError(
                f"The conversation of {num_tokens:,} tokens needs {needed} for keys, values and activations, and "
                f"{format_size(max(room, 0))} can be had, with the expert slots that could make room (planned were "
                f"{self._placement.context:,} tokens). Raise --{fast}, shorten the message, or begin anew (/reset)."
            )
        return low

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder: makes room for what this forward adds."""
        cache = kwargs.get("past_key_values")
        inputs = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        inputs = args[0] if inputs is None and args else inputs
        if isinstance(cache, Cache) and inputs is not None:
            batch, num_new = inputs.shape[:2]
            self._admit(cache, batch * (cache.get_seq_length() + num_new), batch * num_new)

    def _admit(self, cache: Cache, num_tokens: int, num_new: int) -> None:
        known = self._tokens.get(cache, 0)
        if self._is_decoding and num_new == 1 and known // 2 <= num_tokens <= known:
            return  # but a much shorter conversation, or one whose prompt is computed, lets slots come back
        with self._lock:
            extra = self._others(cache) + self._need(num_tokens, num_new) - self._planned_bytes
            num_slots = self._placement.fast.num_slots - -(-max(0, extra) // self._placement.fast.slot_bytes)
            if num_slots != self.num_slots and num_slots >= self._least_slots:
                self.num_slots = self._resize(num_slots)
            if self.num_slots > num_slots:
                raise BudgetError(
                    f"{num_tokens:,} tokens of context need {format_size(extra)} more than was planned for "
                    f"{self._placement.context:,}, and expert slots cannot give up that much. "
                    f"Raise --{self._placement.fast.name.lower()}, or name a longer --context."
                )
            self._tokens[cache], self._is_decoding = _in_steps(num_tokens), num_new == 1

    @property
    def _spare_bytes(self) -> int:
        return (self._placement.fast.num_slots - self._least_slots) * self._placement.fast.slot_bytes

    def _others(self, cache: Cache | None) -> int:
        return sum(
            cache_bytes(self._shape, num_tokens, self._dtype)
            for other, num_tokens in list(self._tokens.items())
            if other is not cache
        )

    def _need(self, num_tokens: int, num_new: int) -> int:
        activations = activation_bytes(self._shape, num_tokens, self._dtype, num_new=num_new)
        return cache_bytes(self._shape, _in_steps(num_tokens), self._dtype) + activations


def _in_steps(num_tokens: int) -> int:
    return -(-num_tokens // STEP) * STEP
