"""How many prompt tokens are computed at once.

Each chunk needs every expert of every layer once, so larger chunks read less; and a chunk's activations must fit beside
the slots. The size depends on the model and on the kind of device, never on free memory: where torch computes prompts,
chunking changes last bits.
"""

from offload_moe.chat.prefix import continues_exactly
from offload_moe.families.text_model import TextModel
from offload_moe.plan.budget import CPU_PROMPT_TOKENS, DEVICE_PROMPT_TOKENS


def prompt_chunk_tokens(hf: TextModel) -> int | None:
    """Tokens per chunk; None where a prompt is computed in one pass, as the family continues no state exactly."""
    if not continues_exactly(hf):
        return None
    return CPU_PROMPT_TOKENS if hf.device.type == "cpu" else DEVICE_PROMPT_TOKENS
