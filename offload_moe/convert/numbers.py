"""Checks that weights, and what is computed with them, are numbers."""

from collections.abc import Mapping

from torch import Tensor

from offload_moe.errors import CheckpointError


def check_numbers(name: str, values: Tensor) -> None:
    """Refuse NaN; infinite numbers are allowed, since masks use them. Raises: CheckpointError."""
    if values.is_floating_point() and values.sum().isnan() and values.isnan().any():
        raise CheckpointError(f"{name}: it has NaN weights, which would spoil every answer. Download the model again.")


def check_finite(tensors: Mapping[str, Tensor], owner: str = "") -> None:
    """Refuse NaN and infinite weights. owner: goes before their name. Raises: CheckpointError."""
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise CheckpointError(f"{owner}{name} has NaN or infinite weights. Download the model again.")
