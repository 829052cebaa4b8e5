"""The embedded demo model: SmolLM2-135M-Instruct turned into a real Mixture of Experts."""

from offload_moe.demo.build import checkpoint

__all__ = ["checkpoint"]
