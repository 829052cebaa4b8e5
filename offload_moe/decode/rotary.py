"""Rotary position embeddings of decode steps: prepared once per token or looked up, applied in three operations.

``x * cos + rotate_half(x) * sin`` is ``x * cos + roll(x) * signed_sin``: the same products and the same sum, so the
same bits. Shapes: B batch, N heads, D rotated dims.
"""

from collections.abc import Callable

import torch
from torch import Tensor, cat

Embeddings = tuple[Tensor, Tensor] | Tensor  # what a model's rotary embedding gives
Rotary = tuple[Tensor, Tensor]  # cos and signed sin of T tokens, [T, D]

BLOCK = 64  # positions
MOST_BLOCKS = 256


class StepRotary:
    """Shared by the attention modules of one model, which all get the same cos and sin in one forward."""

    def __init__(self, *, is_half: bool) -> None:
        """is_half: the model's cos and sin are made for one half of the rotated dims (gpt-oss), not for both."""
        self._is_half = is_half
        self._prepared: tuple[object, Tensor, Tensor] = (None, Tensor(), Tensor())

    def prepare(self, position_embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """cos, sin ``[B, 1, D]`` or ``[B, 1, D / 2]``, or complex numbers -> cos, signed sin ``[B, 1, 1, D]``."""
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


class RotaryTable(StepRotary):
    """The same for native calls, by position: made for a block of positions at a time, and kept."""

    def __init__(self, embed: Callable[[Tensor], Embeddings], *, is_half: bool, is_by_position: bool) -> None:
        """embed: the model's rotary embedding, of positions ``[1, T]``.

        is_by_position: it gives for each position what it gives for that one alone.
        """
        super().__init__(is_half=is_half)
        self._embed, self._is_by_position = embed, is_by_position
        self._blocks: dict[int, list[Rotary]] = {}

    def rows(self, positions: Tensor) -> Rotary | None:
        """Of positions ``[1, T]``; None where they cannot be looked up."""
        if not self._is_by_position or positions.dim() != 2 or positions.is_floating_point():
            return None
        first, *others = (self._row(position) for position in positions.tolist()[0])
        if not others:
            return first
        cos, signed_sin = zip(first, *others, strict=True)
        return cat(cos), cat(signed_sin)

    def _row(self, position: int) -> Rotary:
        number, place = divmod(position, BLOCK)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) == MOST_BLOCKS:
                self._blocks.clear()
            prepared = self.prepare(self._embed(block_of(position)))
            block = self._blocks[number] = list(zip(*(part[0, 0].split(1) for part in prepared), strict=True))
        return block[place]


def block_of(position: int) -> Tensor:
    """The positions of its block, ``[1, BLOCK]``."""
    first = position // BLOCK * BLOCK
    return torch.arange(first, first + BLOCK)[None]


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """``[B, N, 1, D]`` with the halves of its last dimension rotated; dimensions beyond those of cos pass through."""
    rotated_dims = cos.shape[-1]
    if rotated_dims == x.shape[-1]:
        return (x * cos).add_(x.roll(rotated_dims // 2, -1).mul_(signed_sin))
    return cat((rotate(x[..., :rotated_dims], cos, signed_sin), x[..., rotated_dims:]), -1)
