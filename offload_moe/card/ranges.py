"""Names for a profiler: NVTX ranges of what a card computes, where `OFFLOAD_MOE_NVTX` is set to 1."""

import os
from contextlib import AbstractContextManager, nullcontext

from torch.cuda import nvtx

NVTX_VARIABLE = "OFFLOAD_MOE_NVTX"


def named(name: str) -> AbstractContextManager[object]:
    """What begins here, until its end, has this name in Nsight."""
    if os.environ.get(NVTX_VARIABLE) != "1":
        return nullcontext()
    return nvtx.range(name)
