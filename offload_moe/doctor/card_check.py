"""The device pass on a card against the pass on the CPU: the same hidden states, bit for bit.

Both see the same keys and values, which are drawn at random: a card's prompts are computed by other kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.angles import Angles
from offload_moe.card.forward import CardForward
from offload_moe.card.mode import Mode
from offload_moe.card.model import decoder_parts
from offload_moe.card.passes import CardPass
from offload_moe.decode.cache import give_room
from offload_moe.doctor.outcome import Failed, Skipped
from offload_moe.engine.load import load
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache

CONTEXT, NUM_SEEN, NUM_TOKENS = 64, 7, 4
SETTINGS: dict[str, Any] = {"context": CONTEXT, "dense_codec": "int8", "prefetch": 0, "speculate": "off"}
FEW_SLOTS = 6
WAYS: tuple[tuple[Mode, int | None], ...] = (
    ("queued", None),
    ("queued", FEW_SLOTS),
    ("stepwise", FEW_SLOTS),
)  # mode, and slots of the card; None: all
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the CPU gives.

    hidden: fp32 ``[tokens, H]``, behind the last norm. angles: its tables, whose cosines torch computes.
    """

    hidden: Tensor
    angles: Angles


def pass_on_cpu(store: Path) -> Expected:
    """What a card has to give."""
    with load(store, device="cpu", **SETTINGS) as model:
        decoder, cache, states = model.hf.get_decoder(), _cache_of(model), []
        with torch.inference_mode():
            for token in _tokens(model):
                out = decoder(input_ids=torch.tensor([[token]]), **with_cache(cache), use_cache=True)
                states.append(out.last_hidden_state[0, 0].float())
        return Expected(hidden=torch.stack(states), angles=Angles(decoder_parts(model.hf), CONTEXT, CPU))


def check_card(store: Path, expected: Expected) -> str:
    """Compare every way of a pass. Raises: Skipped without a device pass, Failed where a bit differs."""
    if not expected.hidden.abs().max() > 0:
        raise Failed("the expected numbers are all zero, so the comparison proves nothing")
    with load(store, **SETTINGS) as model:
        card = _pass_of(model)
        tables = card.rooms.angles
        with torch.inference_mode():  # torch's cosines on a card may differ in the last bit, and are not in question
            tables.cos[:CONTEXT] = expected.angles.cos
            tables.signed_sin[:CONTEXT] = expected.angles.signed_sin
        for mode, num_slots in WAYS:
            model.engine.hierarchy.resize("vram", num_slots or model.engine.hierarchy.pools.keys.total)
            card.mode.mode = mode
            found = torch.stack(list(_states(model, card)))
            num_wrong = int((found.view(torch.int32) != expected.hidden.view(torch.int32)).any(1).sum())
            if num_wrong:
                error = float((found - expected.hidden).abs().max() / expected.hidden.abs().max())
                raise Failed(
                    f"{num_wrong} of {NUM_TOKENS} tokens have other bits than the CPU's, {mode}, by {error:.1e} of the "
                    "largest number"
                )
    return f"the same bits as the CPU for {NUM_TOKENS} tokens in {len(WAYS)} ways, with few slots and with all"


def _states(model: Model, card: CardPass) -> Iterator[Tensor]:
    cache = _cache_of(model)
    with torch.inference_mode():
        for place, token in enumerate(_tokens(model), NUM_SEEN):
            yield card.run([token], [place], [cache])[0].float().cpu().clone()
    card.begin_other_forward()


def _pass_of(model: Model) -> CardPass:
    forward = model.hf.get_decoder().forward
    if not isinstance(forward, CardForward):
        raise Skipped("there is no device pass on this machine; `load` says why")
    return forward.plan.card


def _tokens(model: Model) -> list[int]:
    return [(37 * place + 11) % model.hf.config.vocab_size for place in range(NUM_TOKENS)]


def _cache_of(model: Model) -> Any:
    """Keys and values of some earlier tokens, exact in bf16."""
    from transformers import DynamicCache

    config, random = model.hf.config, torch.Generator().manual_seed(0)
    cache = DynamicCache(config=config)
    give_room(cache, CONTEXT, torch.bfloat16)
    heads = config.num_key_value_heads
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        drawn = torch.randn(2, 1, heads, NUM_SEEN, dims, generator=random).to(torch.bfloat16).float()
        cache.update(*drawn.to(model.hf.device), layer)
    return cache
