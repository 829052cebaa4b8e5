"""An error in place of nonsense where a model that was trained in bf16 leaves the range of fp16, 65,504."""

from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel


def watch_overflow(hf: TextModel) -> None:
    """Make a model that computes in fp16 raise ConfigError at the first logits that are not finite.

    Checks the last position of each forward, where the host waits for a token in any case.
    """
    head = hf.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(_check)


def _check(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
    if not bool(torch.isfinite(logits[:, -1]).all()):
        raise ConfigError(
            "The model's numbers left the range of fp16 (65,504), so what follows would be nonsense. Load with --dtype "
            "fp32, which is slower and needs twice the memory."
        )
