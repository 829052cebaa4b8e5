"""Memory for growing contexts: keys and values beyond the plan take the memory of expert slots.

If RAM is the fast tier, slots also borrow planned memory that is not needed yet, and return it before it is needed.

The pool is resized before a prompt is computed, and before every forward, while no expert is leased by it. Slots of a
device also give way to what other programs take of its memory.
"""

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache

from offload_moe.decode.cache import STEP
from offload_moe.decode.forward import SeveralCaches
from offload_moe.decode.latent import NAME as LATENT_ATTENTION
from offload_moe.errors import BudgetError, TransferError
from offload_moe.families.cache_name import cache_in
from offload_moe.families.text_model import TextModel
from offload_moe.memory.copier import DeviceMemory
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.plan.budget import give_back_freed_memory
from offload_moe.plan.others import BACK_AFTER_S, OtherPrograms
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement
from offload_moe.plan.working import activation_bytes, cache_bytes
from offload_moe.system.sizes import format_size

logger = logging.getLogger(__name__)

GROWING = ("key/value cache", "activations")  # parts of the plan
NEVER_BORROWED_BYTES = 12 << 20  # freed blocks too small to return to the system at once: 4 to 15 MB were found
DOUBT = 0.25  # reserve, as a share of the expected activations, that is not borrowed
UNBOUNDED = 1 << 24  # tokens, for models without a maximum

Resize = Callable[[int], int]


class ContextRoom:
    """Divides memory between the fast tier's slots and the live caches. Safe for several threads."""

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        placement: Placement,
        resize: Resize,
        *,
        borrows: bool = False,
        draft_token_bytes: int = 0,
    ) -> None:
        """resize: changes the number of the fast tier's slots, and returns the new number.

        borrows: slots may borrow planned memory that the context does not need yet. draft_token_bytes: keys and values
        of a draft model, which keeps a cache of its own beside each; they lie in RAM.
        """
        self._draft_token_bytes = draft_token_bytes if placement.vram is None else 0
        self._shape, self._dtype, self._placement, self._resize = shape, dtype, placement, resize
        self.borrows = borrows
        self._tokens: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()  # tokens of the last resize, batch included
        self._is_decoding = False  # whether the last resize was for a single token
        self._lock = threading.Lock()
        fast = placement.fast
        wanted = sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)
        self.num_slots = fast.num_slots
        self._least_slots = min(fast.num_slots, wanted)
        planned = (part.num_bytes for part in fast.fixed if part.name in GROWING)
        left_over = max(0, (fast.budget_bytes or 0) - fast.used_bytes)  # where every expert has a slot
        self.planned_bytes = sum(planned) + left_over + placement.context * self._draft_token_bytes
        self._slots_for_context = self.num_slots  # what contexts alone would leave
        self.others: OtherPrograms | None = None
        self._num_said = 0  # lost slots of which a line was written
        self._unreached: int | None = None  # slots that the last resize was for, if it failed

    def watch(self, measure: Callable[[], DeviceMemory]) -> None:
        """Let slots give way to what other programs take of the device's memory from now on, where it reports that."""
        with suppress(BudgetError):
            self.others = OtherPrograms(measure, self.planned_bytes)

    @property
    def num_slots_given_up(self) -> int:
        """Slots below the planned number, without those of `num_slots_lost`."""
        return max(0, self._placement.fast.num_slots - self.num_slots - self.num_slots_lost)

    @property
    def num_slots_lost(self) -> int:
        """Slots below the planned number that made room for other programs."""
        left = min(self._placement.fast.num_slots, self._slots_for_context)
        return max(0, left - self.num_slots) if self._taken_bytes else 0

    @property
    def _taken_bytes(self) -> int:
        return 0 if self.others is None else self.others.num_bytes

    def limit(self, num_tokens: int, num_new: int, cache: Cache | None = None) -> int:
        """The longest conversation, prompt and answer together, in tokens.

        num_tokens: of the prompt. num_new: those of them that are computed at once.

        Raises: BudgetError when the prompt and a first token do not fit.
        """
        with self._lock:
            room = self.planned_bytes + self._spare_bytes - self._others(cache)
        low, high = 0, self._shape.max_context or UNBOUNDED
        while low < high:  # bisection for the longest that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needed_bytes(middle, 1) <= room else (low, middle - 1)
        if low <= num_tokens or self.needed_bytes(num_tokens, num_new) > room:
            needed = format_size(self.needed_bytes(num_tokens + 1, num_new))
            fast = self._placement.fast.name.lower()
            raise BudgetError(
                f"The conversation of {num_tokens:,} tokens needs {needed} for keys, values and activations, and "
                f"{format_size(max(room, 0))} is available, including expert slots that can be freed (the plan was for "
                f"{self._placement.context:,} tokens). Raise --{fast}, shorten the message, or start over (/reset)."
            )
        return low

    def slots_for(self, num_tokens: int, num_new: int) -> int:
        """How many slots one conversation has while a forward brings it to `num_tokens` by `num_new`."""
        extra = self.needed_bytes(num_tokens, num_new) - self.planned_bytes
        return max(self._least_slots, self._slots_beside(extra, self._activations(num_tokens, num_new)))

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder: resizes the pool for the tokens that this forward adds."""
        cache = cache_in(kwargs)
        inputs = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        inputs = args[0] if inputs is None and args else inputs
        if inputs is None:
            return
        batch, num_new = inputs.shape[:2]
        if isinstance(cache, Cache):
            num_cached = cache.get_seq_length()
            # A decode step of a few rows counts as one: slots must not come and go with guesses.
            is_step = batch == 1 and num_cached > 0 and num_new <= MAX_ROWS
            self._admit(cache, batch * (num_cached + num_new), 1 if is_step else batch * num_new)
        elif isinstance(cache, SeveralCaches):
            for each in cache.caches:
                self._admit(each, each.get_seq_length() + 1, 1)
        else:
            self._pass(batch * num_new)

    def _admit(self, cache: Cache, num_tokens: int, num_new: int) -> None:
        known = self._tokens.get(cache, 0)
        num_tokens = _held(known, num_tokens, num_new)
        is_step = self._is_decoding and num_new == 1 and num_tokens == known
        if is_step and self.others is None:
            return  # a much shorter conversation, or the end of a prompt, lets the pool grow again
        with self._lock:
            taken = self._taken_bytes
            has_changed = self._look(is_step=is_step, is_prompt=num_new > 1)
            if is_step and not has_changed and not self._owes_slots:
                return
            extra = self._others(cache) + self.needed_bytes(num_tokens, num_new) - self.planned_bytes
            # Slots do not come back behind each prompt while memory is short.
            may_grow = num_new > 1 or has_changed or not self._taken_bytes
            has_room = self._have(extra, self._activations(num_tokens, num_new), may_grow=may_grow)
            if self.others is not None and self._was_refused and taken > self._taken_bytes:
                self.others.put_off(taken)
            self._say_what_was_lost()
            if not has_room:
                raise BudgetError(
                    f"{num_tokens:,} tokens of context need {format_size(extra)} more than the plan for "
                    f"{self._placement.context:,}, and freeing expert slots does not yield that much. "
                    f"Raise --{self._placement.fast.name.lower()}, or set a longer --context."
                )
            self._tokens[cache], self._is_decoding = self._in_steps(num_tokens), num_new == 1

    def _look(self, *, is_step: bool, is_prompt: bool) -> bool:
        """Whether other programs have taken or freed memory since the last look."""
        if self.others is None:
            return False
        if is_prompt and self._is_decoding:
            self.others.settle()
        return self.others.look(now=not is_step)

    @property
    def _owes_slots(self) -> bool:
        """Whether the pool is larger than memory allows, because the last resize failed."""
        return self._unreached is not None and self._unreached < self.num_slots

    @property
    def _was_refused(self) -> bool:
        """Whether the last resize was to add slots, and failed."""
        return self._unreached is not None and self._unreached > self.num_slots

    def _pass(self, num_new: int) -> None:
        """Reclaim the borrowed memory that a forward without a cache needs."""
        with self._lock:
            extra = self._others(None) + self.needed_bytes(num_new, num_new) - self.planned_bytes
            num_slots = self._slots_beside(extra, self._activations(num_new, num_new))
            self._resize_to(min(self.num_slots, max(self._placement.fast.num_slots, num_slots)))
            self._is_decoding = False

    def _slots_beside(self, extra: int, activations: int) -> int:
        """The number of slots if contexts take `extra` bytes more, or fewer, than planned.

        activations: their bytes in `extra`, an estimate, of which a share is kept in reserve.
        """
        fast = self._placement.fast
        num_missing = -(-max(0, extra) // fast.slot_bytes)
        num_reserved = max(0, -extra - NEVER_BORROWED_BYTES - int(DOUBT * activations)) // fast.slot_bytes
        most_slots = self._shape.num_experts if self.borrows else fast.num_slots
        return min(most_slots, fast.num_slots - num_missing + num_reserved)

    def _have(self, extra: int, activations: int, *, may_grow: bool) -> bool:
        """Resize the pool. False: it cannot be as small as contexts need. extra, activations: as of `_slots_beside`.

        Other programs' memory refuses no context: it leaves the slots that the experts of a token need, at least.
        """
        most = self._slots_for_context = self._slots_beside(extra, activations)
        if most < self._least_slots:
            return False
        wanted = max(self._least_slots, self._slots_beside(extra + self._taken_bytes, activations))
        return not self._resize_to(wanted if may_grow else min(wanted, self.num_slots)) or self.num_slots <= most

    def _resize_to(self, num_slots: int) -> bool:
        """False: slots are in use by another thread, or the system has no memory for more.

        Then the answer continues. The next step tries again to free slots; those that could not be added wait for a
        prompt, or for other programs' memory to be free for some seconds more.
        """
        self._unreached = None
        if num_slots != self.num_slots:
            give_back_freed_memory()  # activations of the previous forward, which may have been a prompt
            try:
                self.num_slots = self._resize(num_slots)
            except (BudgetError, TransferError):
                self._unreached = num_slots
                return False
        return True

    def _say_what_was_lost(self) -> None:
        """One line when more slots than ever are lost, and one when all are back."""
        lost = self.num_slots_lost
        if lost > self._num_said:
            self._num_said = lost
            logger.warning(
                "Other programs have taken VRAM: %d expert slots (%s) made room for it, %d are left. They come back "
                "%d s after that memory is free again.",
                lost,
                format_size(lost * self._placement.fast.slot_bytes),
                self.num_slots,
                BACK_AFTER_S,
            )
        elif self._num_said and not self._taken_bytes:
            self._num_said = 0
            logger.info("That VRAM is free again: %d expert slots are in use.", self.num_slots)

    @property
    def _spare_bytes(self) -> int:
        return (self._placement.fast.num_slots - self._least_slots) * self._placement.fast.slot_bytes

    def _others(self, cache: Cache | None) -> int:
        return sum(
            self._cache_bytes(num_tokens) for other, num_tokens in list(self._tokens.items()) if other is not cache
        )

    def needed_bytes(self, num_tokens: int, num_new: int) -> int:
        """Of keys, values and activations, where a forward brings one conversation to `num_tokens` by `num_new`."""
        return self._cache_bytes(self._in_steps(num_tokens)) + self._activations(num_tokens, num_new)

    def _cache_bytes(self, num_tokens: int) -> int:
        kept = cache_bytes(self._shape, num_tokens, self._dtype, kept=self._placement.cache_dtype)
        return kept + num_tokens * self._draft_token_bytes

    def _activations(self, num_tokens: int, num_new: int) -> int:
        num_tokens, kept = self._in_steps(num_tokens), self._placement.cache_dtype
        return activation_bytes(self._shape, num_tokens, self._dtype, kept=kept, num_new=num_new)

    def _in_steps(self, num_tokens: int) -> int:
        """Round up to a step, but not above the planned context if that suffices."""
        steps, planned = -(-num_tokens // STEP) * STEP, self._placement.context
        return min(steps, planned) if num_tokens <= planned else steps


def may_borrow(hf: TextModel, shape: ModelShape, placement: Placement) -> bool:
    """Whether slots may borrow planned memory of the context, whose future need must be known exactly.

    False with a device, whose memory is resized by chunks; if a layer keeps anything else than keys and values of all
    tokens; and if attention materializes its scores, as for latents that are not absorbed. The plan does not contain
    all of that memory, and the unused part of the context covers it.
    """
    config = hf.config.get_text_config(decoder=True)
    without_scores = f"{LATENT_ATTENTION}_sdpa" if shape.attention.has_latents else "sdpa"
    writes_no_scores = config._attn_implementation == without_scores
    gives_back = sys.platform.startswith(
        "linux"
    )  # `Arena.shrink` and blocks that forwards free return memory only there
    return (
        placement.vram is None
        and shape.attention.keeps_all_tokens
        and writes_no_scores
        and gives_back
        and not hf.config.is_encoder_decoder
    )


def _held(known: int, num_tokens: int, num_new: int) -> int:
    """Tokens whose memory a cache holds: a cropped cache keeps it until half is empty, see `RoomyLayer.crop`.

    known: the tokens of the last resize.
    """
    has_let_go = 2 * (num_tokens - num_new) <= known - STEP
    return num_tokens if has_let_go else max(known, num_tokens)
