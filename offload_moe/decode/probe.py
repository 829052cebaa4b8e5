"""Recognizing a module by what it computes.

A replacement is put in place only where it gives the module's own results on probes: names and classes suggest, numbers
decide. Where exactness is asked for, the results must be the same bits.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NUM_CACHED = 5  # tokens in the cache of a probe
SCALES = (1e-2, 1.0, 30.0)  # small enough that an epsilon counts, large enough to reach a clamp

# What a module raises on a probe that it is not made for. Then it is of another kind, and loading goes on without it.
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
PACKAGE = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
PLACES = frozenset({"layer_idx", "layer_index", "layer_id"})  # where a module is, not what it does


class Uncovered(Exception):
    """A module that no kernel call replaces. reasons: what of it."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Refused(Exception):
    """A module does not take a probe. Raised from its own error."""


def answer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module's own forward gives for a probe.

    Raises:
        Refused: the module does not take it.
        Exception: as it is where our own code raised it, or torch in a call of ours: in this forward, or in a part that
            we replaced.
    """
    try:
        return forward(*args, **kwargs)
    except REFUSALS as error:
        if _is_ours(error):
            raise
        raise Refused(f"{type(error).__name__}: {error}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost line that raised it is in this package; torch's own lines, which it calls, do not count."""
    assert error.__traceback__ is not None
    frames = (Path(frame.f_code.co_filename).parents for frame, _ in walk_tb(error.__traceback__.tb_next))
    return PACKAGE in ([parents for parents in frames if TORCH not in parents] or [()])[-1]


def structure(module: nn.Module) -> Hashable:
    """Equal for modules that compute the same with other weights: class, plain settings, children, shapes.

    The layers of a model are alike; the first of a kind is probed.
    """
    plain = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
    settings = tuple(sorted((name, value) for name, value in plain if name not in PLACES))
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    tensors = tuple((name, tuple(value.shape), value.dtype) for name, value in own)
    return type(module), settings, tensors, tuple((name, structure(child)) for name, child in module.named_children())


def agree(got: Tensor, expected: Tensor, *, is_exact: bool, tolerance: float | None = None) -> bool:
    """Whether two results are the same bits, or within a relative tolerance, by default that of the dtype."""
    if got.shape != expected.shape or got.dtype != expected.dtype or not bool(torch.isfinite(expected).all()):
        return False
    if is_exact:
        return torch.equal(got, expected)
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    distance = (got.float() - expected.float()).norm()
    return bool(distance <= limit * expected.float().norm())


def probes(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Random inputs, one per scale."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator) * scale).to(device, dtype) for scale in SCALES]
