"""The embedded demo model: SmolLM2-135M-Instruct converted to a Mixture of Experts."""

from offload_moe.demo.build import checkpoint, checkpoint_folder

__all__ = ["checkpoint", "checkpoint_folder"]
