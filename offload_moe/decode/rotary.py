"""Rotary position embeddings: prepared once per forward, applied in three operations.

``x * cos + rotate_half(x) * sin`` is ``x * cos + roll(x) * signed_sin``: the same products and the same sum, so the
same bits. Shapes: B batch, N heads, T tokens, D rotated dims.
"""

from torch import Tensor, cat

Embeddings = tuple[Tensor, Tensor] | Tensor  # what a model's rotary embedding gives


class StepRotary:
    """Shared by the attention modules of one model, which all get the same cos and sin in one forward."""

    def __init__(self, *, is_half: bool) -> None:
        """is_half: the model's cos and sin are made for one half of the rotated dims (gpt-oss), not for both."""
        self._is_half = is_half
        self._prepared: tuple[object, Tensor, Tensor] = (None, Tensor(), Tensor())

    def prepare(self, position_embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """cos, sin ``[B, T, D]`` or ``[B, T, D / 2]``, or complex numbers -> cos, signed sin ``[B, 1, T, D]``."""
        owner, cos, signed_sin = self._prepared
        if owner is not position_embeddings:
            is_half = self._is_half
            if isinstance(position_embeddings, Tensor):
                cos, sin, is_half = position_embeddings.real, position_embeddings.imag, True
            else:
                cos, sin = position_embeddings
            if is_half:
                cos, first, second = cat((cos, cos), -1), sin, sin
            else:
                first, second = sin.chunk(2, dim=-1)
            cos, signed_sin = cos.contiguous().unsqueeze(1), cat((-first, second), -1).unsqueeze(1)
            self._prepared = (position_embeddings, cos, signed_sin)
        return cos, signed_sin


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """``[B, N, T, D]`` with the halves of its last dimension rotated; dimensions beyond those of cos pass through."""
    rotated_dims = cos.shape[-1]
    if rotated_dims == x.shape[-1]:
        return (x * cos).add_(x.roll(rotated_dims // 2, -1).mul_(signed_sin))
    return cat((rotate(x[..., :rotated_dims], cos, signed_sin), x[..., rotated_dims:]), -1)
