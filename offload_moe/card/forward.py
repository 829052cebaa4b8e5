"""The seam: a decoder's forward takes a few new tokens through the device pass, and all others through its modules."""

from typing import Any

from torch import Tensor

from offload_moe.card.model import DecoderParts
from offload_moe.card.passes import CardPass
from offload_moe.decode.forward import Seam
from offload_moe.decode.hooks import Bypass


class CardPlan:
    """What `CardForward` checks before a pass."""

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
    """In place of the forward of one decoder."""

    plan: CardPlan

    def __init__(self, decoder: Any, plan: CardPlan) -> None:
        super().__init__(decoder)
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = None if args else self._pass(**kwargs)
        if output is None:
            self.plan.card.begin_other_forward()
            output = self._modules_forward(*args, **kwargs)
        return output

    def _compute(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor, cache: Any) -> Any:
        if input_ids is None or positions.dim() != 2:
            return None
        places = positions[0].tolist()
        if places != list(range(places[0], places[0] + len(places))):
            return None
        hidden = self.plan.card.run(input_ids[0].tolist(), places, [cache] * len(places))
        dtype = next(self.plan.wiring.norm.parameters()).dtype
        made = hidden.to(dtype, copy=True)[None]
        return self.plan.wiring.make_output(last_hidden_state=made, past_key_values=cache)
