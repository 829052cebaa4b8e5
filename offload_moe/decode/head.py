"""The output head of a model, which may be called without the model where it alone stands behind the decoder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.hooks import Bypass
from offload_moe.decode.probe import Refused, answer
from offload_moe.decode.wiring import Wiring
from offload_moe.families.text_model import TextModel


def head_alone(hf: TextModel, wiring: Wiring) -> Bypass | None:
    """What is passed by where the head is called behind the decoder. None where its products are not the logits."""
    head = hf.get_output_embeddings()
    return Bypass([hf], ()) if isinstance(head, nn.Module) and gives_products(hf, head, wiring) else None


@torch.inference_mode()
def gives_products(hf: TextModel, head: nn.Module, wiring: Wiring) -> bool:
    """Whether the model is its decoder and its head, and its logits are what the head gives for the decoder's hidden
    state, by a rehearsal with stand-ins for both."""
    decoder, given = hf.get_decoder(), []
    if decoder not in (hf.base_model, vars(hf).get("decoder")):
        return False
    hidden = torch.linspace(-1, 1, decoder.config.hidden_size, dtype=hf.dtype, device=hf.device)[None, None]
    logits = torch.linspace(-90, 90, 64, dtype=hf.dtype, device=hf.device)[None, None]

    def stand_in(x: Tensor) -> Tensor:
        given.append(x)
        return logits

    with (
        _replaced(decoder, lambda *_, **__: wiring.make_output(hidden, None)),
        _replaced(head, stand_in),
        suppress(Refused),
    ):
        found = answer(hf, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=hf.device), logits_to_keep=1).logits
        return len(given) == 1 and torch.equal(given[0], hidden) and torch.equal(found, logits)
    return False


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
