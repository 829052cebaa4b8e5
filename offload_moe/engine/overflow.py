"""fp16 ends at 65,504: a model that was trained in bf16 may leave it. Better a message than nonsense."""

from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.errors import ConfigError


def watch_overflow(hf: Any) -> None:
    """Let a model that computes in fp16 stop at the first logits that are not finite.

    One look per forward at the last position, where the host waits for a token in any case.
    """
    hf.get_output_embeddings().register_forward_hook(_check)


def _check(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
    if not bool(torch.isfinite(logits[:, -1]).all()):
        raise ConfigError(
            "The model's numbers left the range of fp16 (65,504), so what follows would be nonsense. Load with --dtype "
            "fp32, which is slower and needs twice the memory."
        )
