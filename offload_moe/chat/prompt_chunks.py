"""How many prompt tokens are computed at once.

Each chunk needs every expert of every layer once, so larger chunks read less; and a chunk's activations must fit beside
the slots. The size depends on the model and on the kind of device, never on free memory: chunking changes last bits.
"""

from transformers import PreTrainedModel

from offload_moe.chat.prefix import continues_exactly
from offload_moe.plan.budget import CPU_PROMPT_TOKENS, DEVICE_PROMPT_TOKENS


def prompt_chunk_tokens(hf: PreTrainedModel) -> int | None:
    """None where the family must compute a prompt in one pass, because it does not continue a state exactly."""
    if not continues_exactly(hf):
        return None
    return CPU_PROMPT_TOKENS if hf.device.type == "cpu" else DEVICE_PROMPT_TOKENS
