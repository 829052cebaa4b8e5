"""The seam: a decoder's forward passes one new token through a plan, and anything else through its modules.

One token of one sequence, in fp32 on the CPU, behind a cache with room, without padding, captures or gradients.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from offload_moe.decode.hooks import is_capturing
from offload_moe.decode.layer import TokenStep
from offload_moe.decode.plan import PassPlan

logger = logging.getLogger(__name__)

CAPTURES = ("output_hidden_states", "output_attentions", "output_router_logits")


class DecoderForward:
    """In place of the forward of one decoder, whose hooks stay where they are."""

    def __init__(self, decoder: Any, plan: PassPlan) -> None:
        self.plan = plan
        self._modules_forward = decoder.forward
        self._config = decoder.config
        self._attention = decoder.config._attn_implementation
        self._names = {module: name for name, module in decoder.named_modules()}
        self._has_said = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            output = self._pass(**kwargs)
            if output is not None:
                return output
        return self._modules_forward(*args, **kwargs)

    def _pass(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """None where the modules have to do it; nothing has changed then."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        is_one = given is not None and (input_ids is None or inputs_embeds is None) and given.shape[:2] == (1, 1)
        if not is_one or use_cache is False or return_dict is False or not self._is_usual(others):
            return None
        plan = self.plan
        if not plan.fits(past_key_values) or not _sees_all(attention_mask, past_key_values):
            return None
        if not plan.bypass.is_clear:
            self._say_why()
            return None
        wiring = plan.wiring
        positions = wiring.positions(position_ids, past_key_values)
        if positions is None:
            return None
        x = wiring.embed(input_ids, inputs_embeds)
        if x.dtype != torch.float32 or not x.is_cpu or x.requires_grad:
            return None
        step = TokenStep(wiring.rotary(x, positions), positions, past_key_values)
        hidden = wiring.norm(plan(x, step))
        return wiring.make_output(last_hidden_state=hidden, past_key_values=past_key_values)

    def _is_usual(self, others: dict[str, Any]) -> bool:
        """Whether no argument and no setting of the config requires anything else."""
        config = self._config
        return (
            not any(value is not None and value is not False for value in others.values())
            and config._attn_implementation == self._attention
            and not any(others.get(name) is None and getattr(config, name, False) for name in CAPTURES)
            and not is_capturing()
        )

    def _say_why(self) -> None:
        if self._has_said:
            return
        self._has_said = True
        changed = [self._names.get(module, "a module") for module in self.plan.bypass.changed_modules()]
        what = f"A forward hook, or a forward of its own, of {changed[0]}" if changed else "A hook of all modules"
        logger.warning("%s is not called on the fast path: tokens pass module by module, which takes longer.", what)


def _sees_all(mask: Any, cache: Any) -> bool:
    """Whether an attention mask ``[1, S]`` hides nothing."""
    if mask is None:
        return True
    is_plain = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
    return is_plain and mask.shape == (1, cache.get_seq_length() + 1) and bool(mask.all())
