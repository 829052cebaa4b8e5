"""Run large Mixture-of-Experts models on one consumer GPU, or none.

>>> from offload_moe import load
>>> model = load("demo")
>>> model.generate("What is the capital of France?", max_new_tokens=20)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from offload_moe.errors import OffloadMoeError

if TYPE_CHECKING:
    from offload_moe.convert.quantize import quantize
    from offload_moe.engine.load import load
    from offload_moe.engine.model import Model
    from offload_moe.engine.options import LoadOptions

# OpenMP's workers spin for milliseconds after each parallel operation of torch, on cores that the kernels' own threads
# need. Read when torch is imported, so it must be said here; whoever sets it otherwise is left alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["LoadOptions", "Model", "OffloadMoeError", "__version__", "load", "quantize"]

_HOMES = {
    "LoadOptions": "offload_moe.engine.options",
    "Model": "offload_moe.engine.model",
    "load": "offload_moe.engine.load",
    "quantize": "offload_moe.convert.quantize",
}


def __getattr__(name: str) -> Any:
    """Torch is imported with the first use, so that `import offload_moe` and `--help` stay quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'offload_moe' has no attribute {name!r}")
